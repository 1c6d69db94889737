"""What a `solve` may ask of its inputs: sums and counts over blocks, small and independent of how blocks are grouped.

A reduction maps one block to a part and adds parts. Counts are integers. Floating sums are float64, of constant
blocks, added in block order within a segment and in segment order within a unit: the same bits for any memory,
threads or chunks. BLAS sums depend on the buffer's alignment and on threads: blocks are fresh buffers, and a worker
has one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mergekit_lfm.kernels.bits import magnitude_bits, masked

if TYPE_CHECKING:
    import torch

    from mergekit_lfm.methods.declare import Block


class Reduction(Protocol):
    """Maps a block to a part, adds parts. `only`: the indices of the blocks to visit, None for all."""

    @property
    def only(self) -> tuple[int, ...] | None:
        """The blocks to visit."""

    def block(self, block: Block) -> Any:
        """The part of one block."""

    def add(self, total: Any, part: Any) -> Any:
        """The parts of two neighbouring runs of blocks as one."""


class _Sum:
    only: tuple[int, ...] | None = None

    def add(self, total: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        return total + part


@dataclass(frozen=True)
class Gram(_Sum):
    """Inner products of the inputs, float64 [n, n]."""

    def block(self, block: Block) -> torch.Tensor:
        import torch

        x = block.x.double()  # [n, m]
        gram = torch.empty(len(x), len(x), dtype=torch.float64, device=x.device)
        for i in range(len(x)):
            for j in range(i + 1):
                gram[i, j] = gram[j, i] = torch.dot(x[i], x[j])
        return gram


@dataclass(frozen=True)
class RowGram:
    """Inner products of every row of `row` elements, float64 [rows, n, n]. Blocks are whole rows."""

    row: int
    only: tuple[int, ...] | None = None

    def block(self, block: Block) -> torch.Tensor:
        x = block.x.double().reshape(len(block.x), -1, self.row)  # [n, rows, row]
        return _pairwise(x, dim=-1)

    def add(self, total: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.cat([total, part])


@dataclass(frozen=True)
class ColumnGram(_Sum):
    """Inner products of every column, float64 [row, n, n], of a matrix with rows of `row` elements. Blocks are whole
    rows."""

    row: int

    def block(self, block: Block) -> torch.Tensor:
        x = block.x.double().reshape(len(block.x), -1, self.row)  # [n, rows, row]
        return _pairwise(x, dim=0)


def _pairwise(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x [n, rows, row] -> [rows or row, n, n], the sums of x_i x_j over dim of the matrices."""
    import torch

    sums = [[(x[i] * x[j]).sum(dim) if j <= i else None for j in range(len(x))] for i in range(len(x))]
    rows = [torch.stack([sums[max(i, j)][min(i, j)] for j in range(len(x))], -1) for i in range(len(x))]  # type: ignore[misc]
    return torch.stack(rows, -2)


@dataclass(frozen=True)
class L1(_Sum):
    """Sums of magnitudes before and after a mask, float64 [n, 2]. mask(block): bit masks [n, m], see `kernels.bits`."""

    mask: Callable[[Block], torch.Tensor]

    def block(self, block: Block) -> torch.Tensor:
        import torch

        kept = masked(block.x, self.mask(block))
        return torch.stack([x.abs().sum(1, dtype=torch.float64) for x in (block.x, kept)], 1)


@dataclass(frozen=True)
class Digits(_Sum):
    """Histogram of one digit of the magnitudes' bits, int64 [n, q, bins].

    Counts the elements whose bits above the digit equal prefixes[i][k]; without prefixes all count and q is 1.
    Reading a magnitude's bits as an integer keeps the order of the values, so a few digits find an order statistic
    exactly.
    """

    shift: int
    width: int
    prefixes: tuple[tuple[int, ...], ...] | None = None

    def block(self, block: Block) -> torch.Tensor:
        import torch

        bins = 1 << self.width
        rows = []
        for i, x in enumerate(block.x):
            digits = magnitude_bits(x) >> self.shift
            if self.prefixes is None:
                rows.append(torch.bincount(digits, minlength=bins)[None])
            else:
                chosen = [_below(digits, self.width, prefix) for prefix in self.prefixes[i]]
                rows.append(torch.stack([torch.bincount(part, minlength=bins) for part in chosen]))
        return torch.stack(rows)


def _below(digits: torch.Tensor, width: int, prefix: int) -> torch.Tensor:
    """The low `width` bits of the entries whose higher bits equal `prefix`.

    In numpy: choosing by a mask takes 0.07 ms there and 0.45 ms in torch for 2^18 elements (torch 2.13, AVX-512).
    """
    import torch

    values = digits.numpy()
    chosen = values[(values >> width) == prefix] if prefix >= 0 else values[:0]
    return torch.from_numpy(chosen & ((1 << width) - 1))


@dataclass(frozen=True)
class Equal:
    """How often each magnitude bits[i][k] occurs in every block, int64 [n, q, blocks]."""

    bits: tuple[tuple[int, ...], ...]
    only: tuple[int, ...] | None = None

    def block(self, block: Block) -> torch.Tensor:
        import torch

        found = [magnitude_bits(x).numpy() for x in block.x]
        counts = [[int((mine == value).sum()) for value in row] for mine, row in zip(found, self.bits, strict=True)]
        return torch.tensor(counts)[..., None]

    def add(self, total: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.cat([total, part], -1)


@dataclass(frozen=True)
class Position:
    """One past the index in its tensor of the `ordinal`-th (from 1) element of input i with magnitude `bits`, in one
    block."""

    i: int
    bits: int
    ordinal: int
    only: tuple[int, ...] | None

    def block(self, block: Block) -> int:
        found = (magnitude_bits(block.x[self.i]) == self.bits).nonzero()
        return block.start + int(found[self.ordinal - 1]) + 1

    def add(self, total: int, part: int) -> int:  # noqa: ARG002
        raise AssertionError("a position lies in one block")


@dataclass(frozen=True)
class SignBalance(_Sum):
    """The sum of the signs of sum_i weights[i] mask_i x_i over all elements, an int64 scalar."""

    weights: tuple[float, ...]
    mask: Callable[[Block], torch.Tensor] | None = None

    def block(self, block: Block) -> torch.Tensor:
        import torch

        kept = block.x if self.mask is None else masked(block.x, self.mask(block))
        total = torch.zeros_like(kept[0])
        for x, weight in zip(kept, self.weights, strict=True):
            total += x * x.new_tensor(weight)
        return total.sign().sum(dtype=torch.int64)
