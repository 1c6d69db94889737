"""One output tensor's inputs as blocks, and the driver of a method's solve.

Inputs in memory and in files have the same blocks in the same order, so the results are the same. A GPU gets chunks of
several blocks at once, because a single block is too little work for it.
"""

from __future__ import annotations

import cmath
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from mergekit_lfm.kernels.block import SEGMENT, Coefficients, Elementwise
from mergekit_lfm.kernels.random import Known, LocalRankedCoins, ranked_mask, ranked_sums, settle
from mergekit_lfm.kernels.reductions import Reduction
from mergekit_lfm.kernels.step import RunStep, Step, run_eagerly
from mergekit_lfm.machine.accelerators import HOST, Accelerator, ReadRange
from mergekit_lfm.methods.method import Method, Unit


@dataclass
class StoredBlock:
    """A `Block` of inputs as they are stored; converts them, and subtracts the base, on demand.

    Also a `Chunk` if they lie on a device: size is the number of elements of a block. flag: [1] there, not 0 once a
    stored or computed value is not finite. known: masks to use again, see `kernels.random.settle`.
    """

    stored: tuple[torch.Tensor, ...]
    stored_base: torch.Tensor | None
    start: int
    dtype: torch.dtype
    run: RunStep
    size: int
    flag: torch.Tensor | None = None
    known: Known | None = None

    @property
    def count(self) -> int:
        return len(self.stored[0])

    def __len__(self) -> int:
        return len(self.stored)

    @cached_property
    def _wide_base(self) -> torch.Tensor | None:
        return None if self.stored_base is None else self.stored_base.to(self.dtype)

    @property
    def device(self) -> torch.device:
        return self.stored[0].device

    @property
    def native(self) -> bool:
        return bool(getattr(self.run, "native", False))

    def row(self, i: int) -> torch.Tensor:
        row = torch.empty(self.count, dtype=self.dtype, device=self.stored[i].device).copy_(self.stored[i])
        return row if self._wide_base is None else row.sub_(self._wide_base)

    def each(self, function: Elementwise, local: Any, out: torch.dtype | None = None) -> Any:
        """function(rows, base, local), rounded to `out`."""
        local = self.settle(local)
        return self.run(Step(function, self.stored, self.stored_base, local, self.dtype, out, self.flag))

    def settle(self, local: Any) -> Any:
        """local with masks in place of coins that depend on ranks."""
        return settle(local, self, self.known, getattr(self.run, "ranked_mask", ranked_mask))

    def sums_by_rank(self, local: LocalRankedCoins) -> torch.Tensor:
        """Sums of magnitudes before and after masks by coins that depend on ranks, float64 [n, 2]."""
        return local.sums(self, self.known, getattr(self.run, "ranked_sums", ranked_sums))

    def blocks(self) -> Iterator[tuple[int, StoredBlock]]:
        """Every block of a chunk with its number in the tensor."""
        for first in range(0, self.count, self.size):
            part = replace(self.part(first, first + self.size), start=self.start + first)
            yield part.start // self.size, part

    def part(self, start: int, stop: int) -> StoredBlock:
        """Elements start .. stop of it as a block of their own, from index 0."""
        base = None if self.stored_base is None else self.stored_base[start:stop]
        return StoredBlock(tuple(x[start:stop] for x in self.stored), base, 0, self.dtype, self.run, self.size)

    def is_finite_with(self, result: torch.Tensor) -> bool:
        """True if the stored tensors and the result are finite."""
        if self.flag is None:
            base = () if self.stored_base is None else (self.stored_base,)
            return all(is_finite(x) for x in (*self.stored, *base, result))
        return not bool(self.flag) and (not result.is_cpu or is_finite(result))

    def copy_to_host(self) -> StoredBlock:
        """A copy in the processor's memory, for the eager reference."""
        base = None if self.stored_base is None else self.stored_base.cpu()
        return StoredBlock(tuple(x.cpu() for x in self.stored), base, self.start, self.dtype, run_eagerly, self.size)


def default_device(device: torch.device) -> AbstractContextManager[object]:
    """Context in which new tensors are made on this device."""
    return nullcontext() if device == torch.get_default_device() else device


def is_finite(x: torch.Tensor) -> bool:
    """True if all of x is finite. A finite sum proves it at once; another sum may have overflowed."""
    total = x.sum(dtype=torch.float32) if x.dtype == torch.float16 else x.sum()
    return cmath.isfinite(total.item()) or bool(x.isfinite().all())


@dataclass(frozen=True)
class Blocks:
    """The inputs of one tensor of `numel` elements, cut into blocks of `block`.

    sources, base: readers of element ranges. dtype: that of the arithmetic. run: runs elementwise functions.
    accelerator: the device that the readers read to. It gets chunks of `at_once` blocks, a divisor of SEGMENT.
    part: elements of a block to merge at a time, if memory is too short for all. known: masks of the blocks, if there
    is room to keep them.
    """

    sources: Sequence[ReadRange]
    base: ReadRange | None
    numel: int
    block: int
    dtype: torch.dtype
    run: RunStep = run_eagerly
    accelerator: Accelerator = HOST
    at_once: int = 1
    part: int | None = None
    known: Known | None = None

    def __len__(self) -> int:
        return -(-self.numel // self.block)

    @property
    def segments(self) -> int:
        """The number of segments of the tensor; an empty tensor has one."""
        return max(1, -(-len(self) // SEGMENT))

    def segment(self, index: int) -> range:
        """The first block of every chunk of one segment."""
        return range(index * SEGMENT, min(len(self), (index + 1) * SEGMENT), self.at_once)

    def pieces(self, segment: int) -> list[tuple[int, int]]:
        """The first element and the end of all that is merged at a time of one segment."""
        first, last = (min(self.numel, i * SEGMENT * self.block) for i in (segment, segment + 1))
        step = self.part or self.block * self.at_once
        return [(start, min(last, start + step)) for start in range(first, last, step)]

    def load(self, index: int) -> StoredBlock:
        """One block, or the chunk that begins with it. Loading the next one may overwrite its memory."""
        start = index * self.block
        return self.load_range(start, min(self.numel, start + self.block * self.at_once))

    def load_range(self, start: int, stop: int) -> StoredBlock:
        """Elements start .. stop as a block. Loading the next ones may overwrite its memory."""
        stored = tuple(read(start, stop) for read in self.sources)
        base = self.base and self.base(start, stop)
        return StoredBlock(stored, base, start, self.dtype, self.run, self.block, self.accelerator.flag(), self.known)

    def reduce_segment(self, request: Reduction, segment: int) -> Any:
        """One segment's part of the reduction, its blocks added in order; None if the request visits no block."""
        return add_parts(request, self._parts(request, segment))

    def _parts(self, request: Reduction, segment: int) -> Iterator[Any]:
        for i in self.segment(segment):
            chunk = range(i, min(len(self), i + self.at_once))
            wanted = [j for j in chunk if request.visits(j)]
            if len(wanted) == len(chunk):
                yield from self._reduce_chunk(request, self.load(i))
            elif wanted:
                single = replace(self, at_once=1)
                yield from (part for j in wanted for part in self._reduce_chunk(request, single.load(j)))

    def _reduce_chunk(self, request: Reduction, chunk: StoredBlock) -> list[Any]:
        """The parts of a chunk, moved to the host, which adds them in the same order for any size of chunks."""
        if not self.accelerator.by_chunk:
            return [request.block(chunk)]
        with default_device(chunk.device):
            parts = request.chunk(chunk)
        return [part.cpu() if isinstance(part, torch.Tensor) else part for part in parts]

    def solve_rows(self, method: Method, unit: Unit, chunk: StoredBlock) -> Coefficients:
        """The coefficients for the rows of one chunk, found from these alone. unit: the tensor, solved by row."""
        row = method.row(unit) or 1
        unit = replace(unit, shape=(chunk.count // row, row), numel=chunk.count, start=chunk.start)
        return run_solve(
            method.solve(unit), lambda request: add_parts(request, iter(self._reduce_chunk(request, chunk)))
        )

    def reduce(self, request: Reduction) -> Any:
        """The value of a reduction over all blocks."""
        return add_parts(request, (self.reduce_segment(request, i) for i in range(self.segments)))


def add_parts(request: Reduction, parts: Iterator[Any]) -> Any:
    """Add the parts that are not None, in order; None without any."""
    return add_in_order(request, enumerate(parts))


def add_in_order(request: Reduction, parts: Iterable[tuple[int, Any]]) -> Any:
    """Add the parts of (index, part) that are not None in the order of their indices, each as soon as possible."""
    total, turn, pending = None, 0, dict[int, Any]()
    for index, part in parts:
        pending[index] = part
        while turn in pending:
            ready = pending.pop(turn)
            turn += 1
            if ready is not None:
                total = ready if total is None else request.add(total, ready)
    return total


def run_solve(solve: Generator[Reduction, Any, Coefficients], over: Callable[[Reduction], Any]) -> Coefficients:
    """Run a solve, computing its reductions by `over`; returns its coefficients."""
    try:
        request = next(solve)
        while True:
            request = solve.send(over(request))
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


def apply_to(block: StoredBlock, method: Method, coefficients: Coefficients, out: torch.dtype) -> torch.Tensor:
    """The merged block, rounded to `out`."""
    with default_device(block.device):
        local = coefficients.at(block.start, block.count, block.dtype)
    return block.each(method.apply, local, out)  # type: ignore[no-any-return]


def merge_blocks(method: Method, unit: Unit, blocks: Blocks, dtype: torch.dtype) -> torch.Tensor:
    """The merged tensor, flat, on the device of the blocks."""
    out = torch.empty(blocks.numel, dtype=dtype, device=blocks.accelerator.device)
    if blocks.numel:
        coefficients = run_solve(method.solve(unit), blocks.reduce)
        for i in range(0, len(blocks), blocks.at_once):
            block = blocks.load(i)
            out[block.start : block.start + block.count] = apply_to(block, method, coefficients, dtype)
    return out
