"""Alignment: transforms that bring one model near another, from weights or from statistics of both on the same data."""

from mergekit_lfm.align.find import align_models
from mergekit_lfm.align.registry import ALIGNERS

__all__ = ["ALIGNERS", "align_models"]
