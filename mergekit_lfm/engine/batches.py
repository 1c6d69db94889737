"""Many small tensors at once: each has its own solve, but they share their reads, their writes and calls of `apply`.

A merge of 32,000 tensors of 64 elements would otherwise spend nearly all its time on calls. The bytes are the same:
sums run over each tensor by itself, in memory of its own, and `apply` is elementwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import xxhash

from mergekit_lfm.engine.blocks import StoredBlock, is_finite, run_solve
from mergekit_lfm.kernels.reductions import Reduction
from mergekit_lfm.kernels.step import RunStep
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.plan.budget import Budget
from mergekit_lfm.plan.job import SMALL, Job
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.plan.roles import TensorRef
from mergekit_lfm.store.formats import bytes_of
from mergekit_lfm.store.tensors import FLOATS

Part = tuple[int, int, Any]  # a tensor's first element among those of a batch, its end, and its coefficients


def split_batches(budget: Budget, jobs: Iterable[int], share: int) -> Iterator[tuple[int, ...]]:
    """Small jobs, indices into the plan's, in batches of up to SMALL elements that fit a worker's share of memory."""
    batch, numel, nbytes = list[int](), 0, 0
    for i in jobs:
        more, scratch = budget.plan.tensors[i].spec.numel, budget.scratch(budget.plan.tensors[i])
        if batch and (numel + more > SMALL or nbytes + scratch > share):
            yield tuple(batch)
            batch, numel, nbytes = [], 0, 0
        batch.append(i)
        numel, nbytes = numel + more, nbytes + scratch
    if batch:
        yield tuple(batch)


def sort_alike(plan: Plan, jobs: Iterable[int]) -> Iterator[list[Job]]:
    """The jobs in groups with the same method, models and dtypes, in the order of the plan."""
    groups, sources = dict[Any, list[Job]](), plan.sources
    for job in (plan.tensors[i] for i in jobs):
        stored = tuple([(i, sources[i][name].dtype) for i, name in job.inputs])
        alike = job.method, job.copied, stored, job.base is None, job.compute, job.dtype
        groups.setdefault(alike, []).append(job)
    yield from groups.values()


@dataclass(frozen=True)
class Batch:
    """The results of jobs, one after another, and each of their inputs likewise; no inputs of copies."""

    merged: torch.Tensor
    columns: tuple[torch.Tensor, ...] = ()

    def digests(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str, list[str]]]:
        """Each job with the xxh3-128 of its result and of its inputs."""
        parts = [(bytes_of(tensor), tensor.itemsize) for tensor in (self.merged, *self.columns)]
        start = 0
        for job in jobs:
            stop = start + job.spec.numel
            digest, *inputs = [xxhash.xxh3_128_hexdigest(data[start * size : stop * size]) for data, size in parts]
            yield job, digest, inputs
            start = stop


def merge_alike(plan: Plan, jobs: Sequence[Job], run: RunStep) -> Batch | None:
    """The results of the jobs; None if an element of them or of the inputs is not finite.

    run: runs elementwise functions.
    """
    first = jobs[0]
    numel = sum(job.spec.numel for job in jobs)
    inputs = zip(*[job.inputs[:1] if job.copied else job.inputs for job in jobs], strict=True)
    columns = tuple(_read_column(plan, refs, numel) for refs in inputs)
    if first.copied:
        return Batch(columns[0]) if first.dtype not in FLOATS or is_finite(columns[0]) else None
    if not all(is_finite(column) for column in columns):
        return None
    rows, base = (columns, None) if first.base is None else (columns[:-1], columns[-1])
    whole = StoredBlock(rows, base, 0, getattr(torch, first.compute), run, numel)
    merged = torch.empty(numel, dtype=getattr(torch, first.dtype))
    for start, stop, local in _join_equal(_solve(plan, jobs, whole)):
        merged[start:stop] = whole.part(start, stop).each(METHODS[first.method].apply, local, merged.dtype)
    return Batch(merged, columns) if is_finite(merged) else None


def _solve(plan: Plan, jobs: Sequence[Job], whole: StoredBlock) -> Iterator[Part]:
    """Each job's place in the block of all, and its coefficients there: the same where a solve has the same input."""
    stop, method, known = 0, METHODS[jobs[0].method], dict[Any, Any]()
    for job in jobs:
        start, stop = stop, stop + job.spec.numel
        own = job.needs_sums or job.by_row or method.random
        key = job.name if own else (id(job.settings), job.shape)
        if key not in known:
            coefficients = run_solve(method.solve(plan.unit([job])), partial(_reduce, whole, start, stop))
            known[key] = coefficients.at(0, stop - start, whole.dtype)
        yield start, stop, known[key]


def _reduce(whole: StoredBlock, start: int, stop: int, request: Reduction) -> Any:
    """The value of a reduction over one tensor, which is one block."""
    return request.block(whole.part(start, stop)) if request.visits(0) else None


def _join_equal(parts: Iterable[Part]) -> Iterator[Part]:
    """The parts, neighbours as one if they have the very same coefficients: numbers that `constant` has made once."""
    pending: Part | None = None
    for part in parts:
        if pending is not None and _are_same(pending[2], part[2]):
            pending = pending[0], part[1], part[2]
            continue
        if pending is not None:
            yield pending
        pending = part
    if pending is not None:
        yield pending


def _are_same(one: Any, other: Any) -> bool:
    """True if two coefficients have one form and the same tensors."""
    if isinstance(one, tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(_are_same, one, other))
    return one is other


def _read_column(plan: Plan, refs: Sequence[TensorRef], numel: int) -> torch.Tensor:
    """Tensors of one source, with so many elements in all, one after another, as they are stored."""
    source = plan.sources[refs[0][0]]
    column = torch.empty(numel, dtype=getattr(torch, source[refs[0][1]].dtype))
    source.read_all_into([name for _, name in refs], bytes_of(column))
    return column
