"""One output tensor's inputs as blocks, and the driver of a method's solve.

The same blocks, in the same order, whether the inputs lie in memory or are read from files, so the results are the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from mergekit_lfm.jobs import SEGMENT
from mergekit_lfm.kernels.fused import Run, Step, run_eagerly
from mergekit_lfm.kernels.reductions import Reduction
from mergekit_lfm.methods.declare import Coefficients, Elementwise, Method, Unit

Read = Callable[[int, int], torch.Tensor]  # (first element, last) -> 1-D tensor of the stored dtype


@dataclass
class StoredBlock:
    """A `Block` of inputs as they are stored; converted, and the base subtracted, when it is asked for."""

    stored: tuple[torch.Tensor, ...]
    stored_base: torch.Tensor | None
    start: int
    dtype: torch.dtype
    run: Run

    @property
    def count(self) -> int:
        return len(self.stored[0])

    def __len__(self) -> int:
        return len(self.stored)

    @cached_property
    def _wide_base(self) -> torch.Tensor | None:
        return None if self.stored_base is None else self.stored_base.to(self.dtype)

    def row(self, i: int) -> torch.Tensor:
        row = torch.empty(self.count, dtype=self.dtype).copy_(self.stored[i])
        return row if self._wide_base is None else row.sub_(self._wide_base)

    def each(self, function: Elementwise, local: Any, out: torch.dtype | None = None) -> Any:
        """function(rows, base, local), rounded to `out`."""
        return self.run(Step(function, self.stored, self.stored_base, local, self.dtype, out))

    def finite(self) -> bool:
        """Whether all that is stored is finite."""
        return all(finite(x) for x in (*self.stored, *(() if self.stored_base is None else (self.stored_base,))))


def finite(x: torch.Tensor) -> bool:
    """Whether all of x is finite. A finite sum tells at once; one that is not may have overflowed."""
    total = x.sum(dtype=torch.float32) if x.dtype == torch.float16 else x.sum()
    return bool(total.isfinite()) or bool(x.isfinite().all())


@dataclass(frozen=True)
class Blocks:
    """The inputs of one tensor of `numel` elements, cut into blocks of `block`.

    sources, base: readers of element ranges. dtype: that of the arithmetic. run: how elementwise functions are run.
    """

    sources: Sequence[Read]
    base: Read | None
    numel: int
    block: int
    dtype: torch.dtype
    run: Run = run_eagerly

    def __len__(self) -> int:
        return -(-self.numel // self.block)

    @property
    def segments(self) -> int:
        """How many segments the tensor has; an empty tensor has one."""
        return max(1, -(-len(self) // SEGMENT))

    def segment(self, index: int) -> range:
        """The blocks of one segment."""
        return range(index * SEGMENT, min(len(self), (index + 1) * SEGMENT))

    def load(self, index: int) -> StoredBlock:
        """One block. It may share memory that loading the next one overwrites."""
        start = index * self.block
        stop = min(self.numel, start + self.block)
        stored = tuple(read(start, stop) for read in self.sources)
        return StoredBlock(stored, self.base and self.base(start, stop), start, self.dtype, self.run)

    def part(self, request: Reduction, segment: int) -> Any:
        """The part of one segment, its blocks added in order; None if the request visits none of them."""
        wanted = (i for i in self.segment(segment) if request.visits(i))
        return added(request, (request.block(self.load(i)) for i in wanted))

    def reduce(self, request: Reduction) -> Any:
        """The value of a reduction over all blocks."""
        return added(request, (self.part(request, i) for i in range(self.segments)))


def added(request: Reduction, parts: Iterator[Any]) -> Any:
    """The parts that there are, added in the given order; None without any."""
    return in_order(request, enumerate(parts))


def in_order(request: Reduction, parts: Iterable[tuple[int, Any]]) -> Any:
    """The parts (index, part) that there are, added by index in whatever order they come, as soon as they can be."""
    total, turn, waiting = None, 0, dict[int, Any]()
    for index, part in parts:
        waiting[index] = part
        while turn in waiting:
            ready = waiting.pop(turn)
            turn += 1
            if ready is not None:
                total = ready if total is None else request.add(total, ready)
    return total


def solved(solve: Generator[Reduction, Any, Coefficients], over: Callable[[Reduction], Any]) -> Coefficients:
    """The coefficients of a solve whose reductions are computed by `over`."""
    try:
        request = next(solve)
        while True:
            request = solve.send(over(request))
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


def apply_to(block: StoredBlock, method: Method, coefficients: Coefficients, out: torch.dtype) -> torch.Tensor:
    """The merged block, rounded to `out`."""
    local = coefficients.at(block.start, block.count, block.dtype)
    return block.each(method.apply, local, out)  # type: ignore[no-any-return]


def merged(method: Method, unit: Unit, blocks: Blocks, dtype: torch.dtype) -> torch.Tensor:
    """The merged tensor, flat, of inputs that lie in memory."""
    out = torch.empty(blocks.numel, dtype=dtype)
    if blocks.numel:
        coefficients = solved(method.solve(unit), blocks.reduce)
        for i in range(len(blocks)):
            block = blocks.load(i)
            out[block.start : block.start + block.count] = apply_to(block, method, coefficients, dtype)
    return out
