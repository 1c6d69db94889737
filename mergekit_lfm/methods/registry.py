"""The registry of merge methods: every `METHODS` tuple of the files beside this one."""

from mergekit_lfm.methods.find import find_methods
from mergekit_lfm.methods.method import Method

METHODS = find_methods("mergekit_lfm.methods", Method)
