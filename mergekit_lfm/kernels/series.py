"""Functions of elements by + and * alone, whose bits no device's or library's own version would have."""

from __future__ import annotations

from math import ceil, log2
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TERMS = 12  # of the series at 1/16: the next is below 2^-80


def exp(x: torch.Tensor, most: float) -> torch.Tensor:
    """e^x of float64 numbers from 0 to `most`, to a relative error of at most 32 `most` 2^-52.

    The series at x / 2^k, at most 1/16, squared k times.
    """
    halvings = 4 + max(0, ceil(log2(most)))
    small = x * 2.0**-halvings
    total = small * (1 / TERMS) + 1
    for k in range(TERMS - 1, 0, -1):
        total = total * (small * (1 / k)) + 1
    for _ in range(halvings):
        total = total * total
    return total
