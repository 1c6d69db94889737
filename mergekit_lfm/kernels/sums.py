"""Weighted sums and the one rounding at the end.

Only + - * /, comparisons and where: no fused forms, so that eager, compiled and GPU code agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

from mergekit_lfm.kernels.constants import constant

if TYPE_CHECKING:
    import torch

    from mergekit_lfm.kernels.block import Rows


@dataclass(frozen=True)
class Weights:
    """One weight for each of the n inputs."""

    values: Sequence[float]

    def at(self, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:  # noqa: ARG002
        """The weights [n]."""
        return constant(tuple(self.values), dtype)


@dataclass(frozen=True)
class Spread:
    """Weights [groups, n] for rows of `row` elements of a tensor, or for its columns. Blocks are whole rows.

    first: the index in the tensor of the rows' first element.
    """

    weights: torch.Tensor
    row: int
    columns: bool = False
    first: int = 0

    def at(self, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """The weights [n, count] of the elements start .. start + count."""
        import torch

        rows, first = count // self.row, (start - self.first) // self.row
        weights = self.weights if self.columns else self.weights[first : first + rows]
        weights = weights.to(torch.get_default_device(), dtype).T
        return weights.repeat(1, rows) if self.columns else weights.repeat_interleave(self.row, dim=1)


def add_up(rows: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of the rows, in their order; a row alone as it is."""
    return reduce(add, rows)


def add_base(delta: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    """base + delta, in the delta's memory, or the delta alone."""
    return delta if base is None else delta.add_(base)


def weighted_sum(rows: Rows, base: torch.Tensor | None, weights: torch.Tensor) -> torch.Tensor:
    """base + sum_i weights[i] x_i, or the sum alone. weights: [n], or [n, m] with one for every element."""
    total = rows[0] * weights[0]
    for i in range(1, len(rows)):
        total += rows[i] * weights[i]
    return add_base(total, base)


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
