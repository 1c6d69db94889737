"""Reductions of quantities that are computed from the inputs, element by element: of a variance, of a score.

The same requests serve them as serve the inputs, such as order statistics by `kernels.ranks`. Nothing is kept between
two passes: a quantity is computed anew from every block.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from mergekit_lfm.kernels.random import LocalRankedCoins, ranked_sums, settle
from mergekit_lfm.kernels.reductions import Reduction

if TYPE_CHECKING:
    import torch

    from mergekit_lfm.kernels.block import Block, Chunk, Coefficients, Elementwise

T = TypeVar("T")


@dataclass(frozen=True)
class ComputedRows:
    """A `Block`, or a `Chunk` of blocks of `size` elements, of computed rows, one for each quantity."""

    stored: tuple[torch.Tensor, ...]
    start: int
    size: int
    native: bool = False

    stored_base = None

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def count(self) -> int:
        return len(self.stored[0])

    @property
    def dtype(self) -> torch.dtype:
        return self.stored[0].dtype

    def row(self, i: int) -> torch.Tensor:
        return self.stored[i].clone()

    def each(self, function: Elementwise, local: Any) -> Any:
        return function(self.stored, None, self.settle(local))

    def settle(self, local: Any) -> Any:
        return settle(local, self)

    def sums_by_rank(self, local: LocalRankedCoins) -> torch.Tensor:
        return local.sums(self, None, ranked_sums)

    def blocks(self) -> Iterator[tuple[int, Block]]:
        for first in range(0, self.count, self.size):
            rows = tuple(x[first : first + self.size] for x in self.stored)
            start = self.start + first
            yield start // self.size, ComputedRows(rows, start, self.size)


@dataclass(frozen=True)
class Derived(Reduction):
    """`request` about quantities in place of the inputs.

    function(rows, base, local) is elementwise and returns one float64 tensor, or a tuple with one for each quantity;
    local is `coefficients` at the block, or None.
    """

    function: Elementwise
    coefficients: Coefficients | None
    request: Reduction

    def visits(self, index: int) -> bool:
        return self.request.visits(index)

    def block(self, block: Block) -> Any:
        return self.request.block(ComputedRows(self._compute(block), block.start, block.count))

    def chunk(self, chunk: Chunk) -> Iterable[Any]:
        return self.request.chunk(ComputedRows(self._compute(chunk), chunk.start, chunk.size, chunk.native))

    def _compute(self, block: Block) -> tuple[torch.Tensor, ...]:
        local = self.coefficients and self.coefficients.at(block.start, block.count, block.dtype)
        rows = block.each(self.function, local)
        return rows if isinstance(rows, tuple) else (rows,)

    def add(self, total: Any, part: Any) -> Any:
        return self.request.add(total, part)


def derive(
    requests: Generator[Reduction, Any, T], function: Elementwise, coefficients: Coefficients | None = None
) -> Generator[Reduction, Any, T]:
    """The same requests, about quantities in place of the inputs; returns their result."""
    try:
        request = next(requests)
        while True:
            request = requests.send((yield Derived(function, coefficients, request)))
    except StopIteration as stop:
        result: T = stop.value
        return result
