"""The reductions that a `solve` may request: small sums and counts over blocks, independent of their grouping.

A reduction maps one block to a part and adds parts. Counts are integers. Floating sums are float64, of constant
blocks, added in block order within a segment and in segment order within a unit: the same bits for any memory,
threads or chunks. BLAS sums depend on the buffer's alignment and on threads: blocks are fresh buffers, and a worker
has one thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mergekit_lfm.kernels.bits import apply_mask, sums_of_magnitudes
from mergekit_lfm.kernels.random import LocalRankedCoins

if TYPE_CHECKING:
    import torch

    from mergekit_lfm.kernels.block import Block, Chunk, Rows


ROWS = 8  # the most inputs of a block to hold in the dtype of the arithmetic at once: 40 would take 400 MB


class Reduction(ABC):
    """Maps a block to a part, and adds parts."""

    def visits(self, index: int) -> bool:  # noqa: ARG002
        """True if the block of this number in its tensor is needed; by default all are."""
        return True

    @abstractmethod
    def block(self, block: Block) -> Any:
        """The part of one block."""

    def chunk(self, chunk: Chunk) -> Iterable[Any]:
        """The parts, in order, of the blocks of a chunk on a device: by default one block after another.

        If adding is exact, it may return sums of several blocks' parts instead.
        """
        return [self.block(block) for index, block in chunk.blocks() if self.visits(index)]

    @abstractmethod
    def add(self, total: Any, part: Any) -> Any:
        """Add the parts of two neighbouring runs of blocks; may reuse the first."""


class Sum(Reduction):
    """A reduction whose parts are tensors to be summed."""

    def add(self, total: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        total += part
        return total


def _as_they_are(rows: Rows, *_: object) -> tuple[torch.Tensor, ...]:
    return tuple(rows)


@dataclass(frozen=True)
class Totals(Sum):
    """The sum of every row, float64 [n]."""

    def block(self, block: Block) -> torch.Tensor:
        import torch

        rows = block.each(_as_they_are, None)  # no fresh memory for each, as a sum changes nothing
        return torch.stack([row.sum(dtype=torch.float64) for row in rows])

    def chunk(self, chunk: Chunk) -> Iterable[torch.Tensor]:
        from mergekit_lfm.kernels.lanes import sums

        return sums([chunk.row(i) for i in range(len(chunk))], chunk.size, chunk.native).cpu().unbind()


@dataclass(frozen=True)
class Gram(Sum):
    """Inner products of the inputs, float64 [n, n]."""

    def block(self, block: Block) -> torch.Tensor:
        import torch

        n, half = len(block), ROWS // 2
        gram = torch.empty(n, n, dtype=torch.float64)
        tiles = [range(n)] if n <= ROWS else [range(first, min(n, first + half)) for first in range(0, n, half)]
        for number, tile in enumerate(tiles):
            x = {i: block.row(i).double() for i in tile}
            for others in tiles[: number + 1]:
                y = x if others == tile else {j: block.row(j).double() for j in others}
                for i, j in ((i, j) for i in tile for j in others if j <= i):
                    gram[i, j] = gram[j, i] = torch.dot(x[i], y[j])
        return gram

    def chunk(self, chunk: Chunk) -> Iterable[torch.Tensor]:
        from mergekit_lfm.kernels.lanes import grams

        return grams(chunk).cpu().unbind()


@dataclass(frozen=True)
class RowGram(Reduction):
    """Inner products of every row of `row` elements, float64 [rows, n, n]. Blocks are whole rows."""

    row: int

    def block(self, block: Block) -> torch.Tensor:
        return _pairwise(_matrices(block, self.row), dim=-1)

    def add(self, total: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.cat([total, part])


@dataclass(frozen=True)
class ColumnGram(Sum):
    """Inner products of every column, float64 [row, n, n], of a matrix with rows of `row` entries, whole in a block."""

    row: int

    def block(self, block: Block) -> torch.Tensor:
        return _pairwise(_matrices(block, self.row), dim=0)


def _matrices(block: Block, row: int) -> list[torch.Tensor]:
    return [block.row(i).double().reshape(-1, row) for i in range(len(block))]


def _pairwise(x: list[torch.Tensor], dim: int) -> torch.Tensor:
    """n matrices [rows, row] -> [rows or row, n, n], the sums of x_i x_j over dim of the matrices."""
    import torch

    n, product = len(x), torch.empty_like(x[0])  # small results between large products would leave holes in memory
    grams = x[0].new_empty(x[0].shape[1 + dim], n, n)
    for i in range(n):
        for j in range(i + 1):
            grams[:, i, j] = grams[:, j, i] = torch.mul(x[i], x[j], out=product).sum(dim)
    return grams


class LocalMask(Protocol):
    """A mask's parameters for one block."""

    def mask(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """A mask of the kept entries of row i, see `kernels.bits`."""


class Mask(Protocol):
    """The kept entries of the inputs."""

    def at(self, start: int, count: int, dtype: torch.dtype) -> LocalMask:
        """The mask of the block of `count` entries from index `start`."""


def magnitudes(rows: Rows, _: torch.Tensor | None, local: LocalMask) -> tuple[torch.Tensor, ...]:
    """|x| of every row, then |x| of the kept entries of every row."""
    sizes = tuple(x.abs() for x in rows)
    return (*sizes, *(apply_mask(size, local.mask(i, x)) for i, (size, x) in enumerate(zip(sizes, rows, strict=True))))


@dataclass(frozen=True)
class L1(Sum):
    """Sums of magnitudes before and after a mask, float64 [n, 2]."""

    mask: Mask

    def block(self, block: Block) -> torch.Tensor:
        import torch

        local = self.mask.at(block.start, block.count, block.dtype)
        if isinstance(local, LocalRankedCoins):
            return block.sums_by_rank(local)
        if len(block) > ROWS:
            rows = map(block.row, range(len(block)))
            return torch.stack([sums_of_magnitudes(x, local.mask(i, x)) for i, x in enumerate(rows)])
        both = self._magnitudes(block)
        return torch.stack([x.sum(dtype=torch.float64) for x in both]).reshape(2, -1).T

    def chunk(self, chunk: Chunk) -> Iterable[torch.Tensor]:
        from mergekit_lfm.kernels.lanes import sums

        each = sums(self._magnitudes(chunk), chunk.size, chunk.native)  # [blocks, 2n]
        return each.reshape(len(each), 2, -1).mT.cpu().unbind()

    def _magnitudes(self, block: Block) -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = block.each(magnitudes, self.mask.at(block.start, block.count, block.dtype))
        return found


@dataclass(frozen=True)
class SignBalance(Sum):
    """The sum of the signs of sum_i weights[i] mask_i x_i over all elements, an int64 scalar."""

    weights: tuple[float, ...]
    mask: Mask | None

    def block(self, block: Block) -> torch.Tensor:
        import torch

        local = self.mask and self.mask.at(block.start, block.count, block.dtype)
        total: torch.Tensor | None = None
        for i, weight in enumerate(self.weights):
            x = block.row(i)
            term = (apply_mask(x, local.mask(i, x)) if local else x) * weight
            total = term if total is None else total.add_(term)
        assert total is not None
        return total.sign().sum(dtype=torch.int64)

    def chunk(self, chunk: Chunk) -> Iterable[torch.Tensor]:
        return [self.block(chunk)]
