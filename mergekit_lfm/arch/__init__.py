"""Symmetry tables of architectures: what can be rewritten in a model without changing what it says."""

from mergekit_lfm.arch.declare import Group, Heads, Symmetries, Units, read_table
from mergekit_lfm.arch.registry import ARCHITECTURES, find_symmetries

__all__ = ["ARCHITECTURES", "Group", "Heads", "Symmetries", "Units", "find_symmetries", "read_table"]
