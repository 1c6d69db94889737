"""Merge methods, one file each: declarations and pure functions.

A method is a value (`Method`) made of a generator `solve`, which asks for reductions over the inputs and returns
small coefficients, and an elementwise `apply`. Files of this package register themselves by being here: each defines
`METHODS`, a tuple. Nothing here imports torch; the functions work on any tensors.
"""

from mergekit_lfm.methods.method import REQUIRED, Method, Parameter
from mergekit_lfm.methods.registry import METHODS

__all__ = ["METHODS", "REQUIRED", "Method", "Parameter"]
