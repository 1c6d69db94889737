"""One output tensor's inputs as blocks, and the driver of a method's solve.

The same blocks, in the same order, whether the inputs lie in memory or are read from files, so the results are the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergekit_lfm.kernels.reductions import Reduction
from mergekit_lfm.kernels.sums import round_once
from mergekit_lfm.methods.declare import Block, Coefficients, Method, Unit
from mergekit_lfm.plan import SEGMENT

Read = Callable[[int, int], torch.Tensor]  # (first element, last) -> 1-D tensor of the stored dtype


@dataclass(frozen=True)
class Blocks:
    """The inputs of one tensor of `numel` elements, cut into blocks of `block`.

    sources, base: readers of element ranges. compute: the dtype of the arithmetic.
    """

    sources: Sequence[Read]
    base: Read | None
    numel: int
    block: int
    compute: torch.dtype

    def __len__(self) -> int:
        return -(-self.numel // self.block)

    @property
    def segments(self) -> int:
        """How many segments the tensor has; an empty tensor has one."""
        return max(1, -(-len(self) // SEGMENT))

    def segment(self, index: int) -> range:
        """The blocks of one segment."""
        return range(index * SEGMENT, min(len(self), (index + 1) * SEGMENT))

    def load(self, index: int) -> Block:
        """One block in the dtype of the arithmetic: the inputs, less the base where there is one."""
        start = index * self.block
        stop = min(self.numel, start + self.block)
        x = torch.empty(len(self.sources), stop - start, dtype=self.compute)
        for row, read in zip(x, self.sources, strict=True):
            row.copy_(read(start, stop))
        if self.base is None:
            return Block(x, None, start)
        base = torch.empty(stop - start, dtype=self.compute).copy_(self.base(start, stop))
        return Block(x.sub_(base), base, start)

    def part(self, request: Reduction, segment: int) -> Any:
        """The part of one segment, its blocks added in order; None if the request visits none of them."""
        wanted = (i for i in self.segment(segment) if request.only is None or i in request.only)
        return added(request, (request.block(self.load(i)) for i in wanted))

    def reduce(self, request: Reduction) -> Any:
        """The value of a reduction over all blocks."""
        return added(request, (self.part(request, i) for i in range(self.segments)))


def added(request: Reduction, parts: Iterator[Any]) -> Any:
    """The parts that there are, added in the given order; None without any."""
    total = None
    for part in parts:
        if part is not None:
            total = part if total is None else request.add(total, part)
    return total


def solved(solve: Generator[Reduction, Any, Coefficients], over: Callable[[Reduction], Any]) -> Coefficients:
    """The coefficients of a solve whose reductions are computed by `over`."""
    try:
        request = next(solve)
        while True:
            request = solve.send(over(request))
    except StopIteration as stop:
        return stop.value


def merged(method: Method, unit: Unit, blocks: Blocks, dtype: torch.dtype) -> torch.Tensor:
    """The merged tensor, flat, of inputs that lie in memory."""
    out = torch.empty(blocks.numel, dtype=dtype)
    if blocks.numel:
        coefficients = solved(method.solve(unit), blocks.reduce)
        for i in range(len(blocks)):
            block = blocks.load(i)
            out[block.start : block.start + block.x.shape[1]] = round_once(method.apply(block, coefficients), dtype)
    return out
