"""Symmetry tables of architectures: the transforms of a model's weights that keep its outputs."""

from mergekit_lfm.arch.registry import ARCHITECTURES, find_symmetries
from mergekit_lfm.arch.table import Group, Heads, Symmetries, Units, read_table

__all__ = ["ARCHITECTURES", "Group", "Heads", "Symmetries", "Units", "find_symmetries", "read_table"]
