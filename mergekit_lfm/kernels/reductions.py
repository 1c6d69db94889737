"""What a `solve` may ask of its inputs: sums and counts over blocks, small and independent of how blocks are grouped.

A reduction maps one block to a part and adds parts. Counts are integers. Floating sums are float64, of constant
blocks, added in block order within a segment and in segment order within a unit: the same bits for any memory,
threads or chunks. BLAS sums depend on the buffer's alignment and on threads: blocks are fresh buffers, and a worker
has one thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mergekit_lfm.kernels.bits import as_integers, masked

if TYPE_CHECKING:
    import torch

    from mergekit_lfm.methods.declare import Block, Rows


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
        total += part
        return total


@dataclass(frozen=True)
class Gram(_Sum):
    """Inner products of the inputs, float64 [n, n]."""

    def block(self, block: Block) -> torch.Tensor:
        import torch

        x = [block.row(i).double() for i in range(len(block))]
        gram = torch.empty(len(x), len(x), dtype=torch.float64)
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
        return _pairwise(_matrices(block, self.row), dim=-1)

    def add(self, total: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.cat([total, part])


@dataclass(frozen=True)
class ColumnGram(_Sum):
    """Inner products of every column, float64 [row, n, n], of a matrix with rows of `row` elements. Blocks are whole
    rows."""

    row: int

    def block(self, block: Block) -> torch.Tensor:
        return _pairwise(_matrices(block, self.row), dim=0)


def _matrices(block: Block, row: int) -> list[torch.Tensor]:
    return [block.row(i).double().reshape(-1, row) for i in range(len(block))]


def _pairwise(x: list[torch.Tensor], dim: int) -> torch.Tensor:
    """n matrices [rows, row] -> [rows or row, n, n], the sums of x_i x_j over dim of the matrices."""
    import torch

    sums = [[(x[i] * x[j]).sum(dim) if j <= i else None for j in range(len(x))] for i in range(len(x))]
    rows = [torch.stack([sums[max(i, j)][min(i, j)] for j in range(len(x))], -1) for i in range(len(x))]  # type: ignore[misc]
    return torch.stack(rows, -2)


class LocalMask(Protocol):
    """A mask's parameters for one block."""

    def mask(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """A mask of the kept entries of row i, see `kernels.bits`."""


class Mask(Protocol):
    """Which entries of the inputs are kept."""

    def at(self, start: int, count: int, dtype: torch.dtype) -> LocalMask:
        """The mask of the block of `count` entries from index `start`."""


def magnitudes(rows: Rows, _: torch.Tensor | None, local: LocalMask) -> tuple[torch.Tensor, ...]:
    """|x| of every row, then |x| of the kept entries of every row."""
    sizes = tuple(x.abs() for x in rows)
    return (*sizes, *(masked(size, local.mask(i, x)) for i, (size, x) in enumerate(zip(sizes, rows, strict=True))))


@dataclass(frozen=True)
class L1(_Sum):
    """Sums of magnitudes before and after a mask, float64 [n, 2]."""

    mask: Mask

    def block(self, block: Block) -> torch.Tensor:
        import torch

        both = block.each(magnitudes, self.mask.at(block.start, block.count, block.dtype))
        return torch.stack([x.sum(dtype=torch.float64) for x in both]).reshape(2, -1).T


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
        for i in range(len(block)):
            digits = _bits(block, i).bitwise_right_shift_(self.shift)
            if self.prefixes is None:
                rows.append(torch.bincount(digits, minlength=bins)[None])
            else:
                chosen = [_below(digits, self.width, prefix) for prefix in self.prefixes[i]]
                rows.append(torch.stack([torch.bincount(part, minlength=bins) for part in chosen]))
        return torch.stack(rows)


def _bits(block: Block, i: int) -> torch.Tensor:
    """The magnitudes' bits of one row. Row by row and in place, as what fits the processor's cache is twice as fast."""
    bits = as_integers(block.row(i))
    return bits.bitwise_and_(0x7FFFFFFF if bits.dtype.itemsize == 4 else 0x7FFFFFFFFFFFFFFF)


def _below(digits: torch.Tensor, width: int, prefix: int) -> torch.Tensor:
    """The low `width` bits of the entries whose higher bits equal `prefix` (none do if it is -1).

    In numpy: choosing by a mask takes 0.07 ms there and 0.45 ms in torch for 2^18 elements (torch 2.13, AVX-512).
    """
    import torch

    values = digits.numpy()
    return torch.from_numpy(values[(values >> width) == prefix] & ((1 << width) - 1))


@dataclass(frozen=True)
class Equal:
    """How often each magnitude bits[i][k] occurs in every block, int64 [n, q, blocks]."""

    bits: tuple[tuple[int, ...], ...]
    only: tuple[int, ...] | None = None

    def block(self, block: Block) -> torch.Tensor:
        import numpy as np
        import torch

        counts = []
        for i, values in enumerate(self.bits):
            bits = _bits(block, i).numpy()
            counts.append([int(np.count_nonzero(bits == value)) for value in values])
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
        found = (_bits(block, self.i) == self.bits).nonzero()
        return block.start + int(found[self.ordinal - 1]) + 1

    def add(self, total: int, part: int) -> int:  # noqa: ARG002
        raise AssertionError("a position lies in one block")


@dataclass(frozen=True)
class SignBalance(_Sum):
    """The sum of the signs of sum_i weights[i] mask_i x_i over all elements, an int64 scalar."""

    weights: tuple[float, ...]
    mask: Mask | None

    def block(self, block: Block) -> torch.Tensor:
        import torch

        local = self.mask and self.mask.at(block.start, block.count, block.dtype)
        total = torch.zeros(block.count, dtype=block.dtype)
        for i, weight in enumerate(self.weights):
            x = block.row(i)
            total += (masked(x, local.mask(i, x)) if local else x) * weight
        return total.sign().sum(dtype=torch.int64)
