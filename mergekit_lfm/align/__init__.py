"""Alignment: transforms that bring one model near another, from weights or from statistics of both on the same data."""

from mergekit_lfm.align.find import find_differences, find_transform
from mergekit_lfm.align.registry import ALIGNERS

__all__ = ["ALIGNERS", "find_differences", "find_transform"]
