"""The registry of merge methods: every `METHODS` tuple of the files beside this one, and of other packages' modules."""

from importlib.metadata import entry_points

from mergekit_lfm.methods.find import find_methods, with_others
from mergekit_lfm.methods.method import Method

METHODS = with_others(find_methods("mergekit_lfm.methods", Method), Method, entry_points(group="mergekit_lfm.methods"))
