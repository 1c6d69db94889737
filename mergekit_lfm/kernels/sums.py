"""Weighted sums and the one rounding at the end.

Only + - * /, comparisons and where: no fused forms, so that eager, compiled and GPU code agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mergekit_lfm.methods.declare import Block


@dataclass(frozen=True)
class Spread:
    """Weights [groups, n] for the rows of `row` elements of a tensor, or for its columns; blocks are made of whole
    rows."""

    weights: torch.Tensor
    row: int
    columns: bool = False

    def over(self, block: Block) -> torch.Tensor:
        """The weights [n, m] of the block's elements."""
        rows = block.x.shape[1] // self.row
        weights = self.weights.to(block.x.dtype).T
        if self.columns:
            return weights.repeat(1, rows)
        first = block.start // self.row
        return weights[:, first : first + rows].repeat_interleave(self.row, dim=1)


def weighted_sum(block: Block, weights: Sequence[float] | Spread) -> torch.Tensor:
    """base + sum_i weights[i] x_i, or without base the sum alone."""
    import torch

    factors = weights.over(block) if isinstance(weights, Spread) else torch.tensor(weights, dtype=block.x.dtype)
    total = block.x[0] * factors[0]
    for x, factor in zip(block.x[1:], factors[1:], strict=True):
        total += x * factor
    if block.base is not None:
        total += block.base
    return total


def round_once(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in `dtype`, rounded to nearest even once.

    torch rounds float64 to a 16-bit type through float32, that is twice. Rounding to float32 with the last bit sticky
    (round to odd) first makes the second rounding right (Boldo and Melquiond 2008, "Emulation of FMA and correctly
    rounded sums", theorem 1).
    """
    import torch

    if x.dtype != torch.float64 or dtype.itemsize >= 4:
        return x.to(dtype)
    near = x.float()
    bits = near.view(torch.int32)
    inexact = (near.double() != x) & near.isfinite()
    toward_zero = bits - (near.double().abs() > x.abs()).int()
    return torch.where(inexact, toward_zero | 1, bits).view(torch.float32).to(dtype)
