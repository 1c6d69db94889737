"""Symmetry tables of architectures: what can be rewritten in a model without changing what it says."""

from mergekit_lfm.arch.registry import ARCHITECTURES, find_symmetries
from mergekit_lfm.arch.table import Group, Heads, Symmetries, Units, read_table

__all__ = ["ARCHITECTURES", "Group", "Heads", "Symmetries", "Units", "find_symmetries", "read_table"]
