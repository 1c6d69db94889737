"""One worker: merges, copies or solves the tensors of a task and writes their bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from threading import Event
from typing import Any

import torch
import xxhash

from mergekit_lfm.engine.blocks import Blocks, ReadRange, StoredBlock, apply_to, default_device, is_finite, run_solve
from mergekit_lfm.engine.linears import StoredLinear
from mergekit_lfm.engine.threads import Stopped
from mergekit_lfm.errors import FormatError
from mergekit_lfm.kernels.block import SEGMENT, Coefficients
from mergekit_lfm.kernels.compiled import Kernels
from mergekit_lfm.kernels.gpu import GpuKernels
from mergekit_lfm.kernels.reductions import Reduction
from mergekit_lfm.kernels.sums import round_once
from mergekit_lfm.machine.accelerators import CHUNK, Accelerator
from mergekit_lfm.methods import METHODS
from mergekit_lfm.output.writer import Output, Policy, Receipt
from mergekit_lfm.plan.budget import Budget
from mergekit_lfm.plan.job import Job
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.plan.sources import TensorRef
from mergekit_lfm.plan.statistics import LinearGroup, LinearJob
from mergekit_lfm.store.formats import bytes_of
from mergekit_lfm.store.tensors import FLOATS, ITEMSIZE

HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Work:
    """One worker's task, done without waiting: all segments of a job that needs sums, or some of one that does not."""

    job: Job
    segments: tuple[int, ...]
    coefficients: Coefficients | None = None
    solve: bool = False


@dataclass(frozen=True, slots=True)
class LinearWork:
    """One worker's task, done without waiting: linear layers that are solved together. missing: segments to write."""

    group: LinearGroup
    missing: Mapping[str, tuple[int, ...]]


@dataclass
class Worker:
    """The state that the tasks of one execution share."""

    plan: Plan
    output: Output
    share: int
    nan: Policy
    progress: Callable[[int], None]
    kernels: Kernels | GpuKernels
    names: tuple[str, ...]
    gpu: Accelerator | None = None
    device_share: int = 0
    stop: Event = field(default_factory=Event)

    @cached_property
    def budget(self) -> Budget:
        """The memory that its work takes."""
        return Budget(self.plan)

    def blocks(self, job: Job, resident: bool = False) -> Blocks:
        """The job's inputs, read from the files block by block or held in memory: the processor's, or the GPU's."""
        ranges = at_once = 1
        if self.gpu is not None:
            ranges = at_once = self._count_blocks(job, min(self.share - self.budget.views(job), self.device_share))
            if resident:  # then the host's memory holds only a chunk's result, pinned and rounded up
                result = job.block * ITEMSIZE[job.dtype]
                at_once = self._count_blocks(job, self.device_share, min(SEGMENT, self.share // (4 * result)))
        readers = {source: self._make_reader(source, job.block * ranges, resident) for source in job.read}
        base = readers[job.base] if job.base else None
        sources = [readers[source] for source in job.sources + job.statistics]
        dtype = getattr(torch, job.compute)
        return Blocks(sources, base, job.spec.numel, job.block, dtype, self.kernels, self.gpu, at_once)

    def _count_blocks(self, job: Job, nbytes: int, most: int = CHUNK) -> int:
        """Blocks per chunk that fit in `nbytes`, at most `most`: a power of two that divides SEGMENT."""
        return 1 << (max(1, min(most, nbytes // max(1, self.budget.working(job)))).bit_length() - 1)

    def _make_reader(self, source: tuple[int, str], most: int, resident: bool) -> ReadRange:
        """A reader of ranges of up to `most` elements, which the next call may overwrite; resident: reads all once."""
        model, name = self.plan.sources[source[0]], source[1]
        numel, dtype = model[name].numel, getattr(torch, model[name].dtype)
        buffer = torch.empty(0 if resident or self.gpu else min(most, numel), dtype=dtype)

        def read(start: int, stop: int, to: torch.Tensor | None = None) -> torch.Tensor:
            if self.stop.is_set():
                raise Stopped
            part = buffer[: stop - start] if self.gpu is None else self.gpu.buffer(stop - start, dtype)
            model.read_into(name, start, bytes_of(part))
            return part if self.gpu is None else self.gpu.up(part, to)

        if not resident:
            return read
        if self.gpu is None:
            whole = model.read(name)
        else:
            whole = torch.empty(numel, dtype=dtype, device=self.gpu.device)
            for number, start in enumerate(range(0, numel, most)):
                read(start, min(numel, start + most), whole[start : start + most])
                if number % 2:  # one range is read while another is copied; no more than two are pinned
                    self.gpu.settle()
        return lambda start, stop: whole[start:stop]

    def missing(self, job: Job) -> tuple[int, ...]:
        """The segments without a receipt."""
        return tuple(s for s in range(job.segments) if (job.name, s) not in self.output.done)

    def take_over(self) -> int:
        """Adopt an interrupted run's receipts, report its bytes to the progress, and return how many it had written.

        Raises FormatError if a receipt names NaN or infinity and this run does not accept them.
        """
        for receipt in self.output.done.values():
            for where in receipt.nonfinite:
                self._not_finite(where)
        jobs = {job.name: job for job in self.plan.tensors}
        done = sum(jobs[name].segment_nbytes(segment) for name, segment in self.output.done)
        self.progress(done)
        return done

    def do(self, work: Work | LinearWork) -> None:
        """Merge or copy the segments of `work`, write them, and record the receipts."""
        with self._working():
            self._do(work)

    def _working(self) -> AbstractContextManager[None]:
        """Context in which a worker computes on the GPU, if the merge uses one."""
        return nullcontext() if self.gpu is None else self.gpu.working()

    def _do(self, work: Work | LinearWork) -> None:
        if isinstance(work, LinearWork):
            self._solve(work)
            return
        job = work.job
        if job.copied:
            for segment in work.segments:
                self._copy(job, segment)
            return
        blocks = self.blocks(job, resident=work.solve)
        coefficients = work.coefficients
        if work.solve and job.spec.numel:
            coefficients = run_solve(METHODS[job.method].solve(self.plan.unit([job])), blocks.reduce)
        for segment in work.segments:
            self._merge(job, blocks, coefficients, segment)

    def _solve(self, work: LinearWork) -> None:
        """Merge linear layers as matrices."""
        bad = set[str]()
        layers = [self._linear(work.group, layer, bad) for layer in work.group.layers]
        jobs = [self.plan.tensors[i] for i in work.group.jobs]
        whole = METHODS[jobs[0].method].whole
        assert whole is not None
        waiting, merging = iter(jobs), whole.merge(self.plan.unit(jobs[:1]), layers)
        for layer in layers:
            with nullcontext() if self.gpu is None else default_device(self.gpu.device):
                merged = next(merging)
            for part in (part for part in layer.parts(merged) if part is not None):
                job = next(waiting)
                tensor = self._finish(job, 0, part)
                if not is_finite(tensor) and not bad:
                    bad.add(self._not_finite(f"{job.name} of the output"))
                for segment in work.missing[job.name]:
                    first = segment * job.segment_numel
                    data = bytes_of(tensor[first : first + job.segment_numel])
                    self.output.write(job.name, first * ITEMSIZE[job.dtype], data)
                    digest = xxhash.xxh3_128_hexdigest(data)
                    self.progress(len(data))
                    self.output.record(Receipt(job.name, segment, digest, tuple(sorted(bad))), len(data))

    def _linear(self, group: LinearGroup, layer: LinearJob, bad: set[str]) -> StoredLinear:
        """A layer whose tensors are read from the files on demand; adds the names of those not finite to `bad`."""
        weight = self.plan.tensors[layer.weight]

        def read(source: TensorRef, start: int, stop: int) -> torch.Tensor:
            if self.stop.is_set():
                raise Stopped
            with nullcontext() if self.gpu is None else default_device(HOST):
                part = self.plan.sources[source[0]].read(source[1], start, stop)
            if not is_finite(part):
                bad.add(self._not_finite(f"{source[1]} of {self.names[source[0]]}"))
            return part

        return StoredLinear(
            read,
            weights=weight.sources,
            biases=() if layer.bias is None else self.plan.tensors[layer.bias].sources,
            grams=group.grams,
            axis=layer.axis,
            outputs=layer.outputs,
            inputs=weight.shape[layer.axis],
        )

    def reduce(self, job: Job, request: Reduction, segment: int) -> Any:
        """One segment's part of a reduction, read from the files."""
        with self._working():
            return self.blocks(job).part(request, segment)

    def _result(self, job: Job, block: StoredBlock, coefficients: Coefficients) -> torch.Tensor:
        """The merged block plus the edits' changes, in the output's dtype."""
        method, edited = METHODS[job.method], job.added is not None
        merged = apply_to(block, method, coefficients, getattr(torch, job.compute if edited else job.dtype))
        return self._finish(job, block.start, merged) if edited else merged

    def _finish(self, job: Job, start: int, merged: torch.Tensor) -> torch.Tensor:
        """Elements from `start` on plus the edits' changes, in the output's dtype and the processor's memory."""
        dtype = getattr(torch, job.dtype)
        if job.added is None:
            return self._to_host(round_once(merged, dtype))
        return round_once(self._to_host(merged).double() + self._read_changes(job, start, start + len(merged)), dtype)

    def _to_host(self, x: torch.Tensor) -> torch.Tensor:
        """x in the processor's memory."""
        return x if self.gpu is None or x.is_cpu else self.gpu.down(x)

    def _read_changes(self, job: Job, start: int, stop: int) -> torch.Tensor:
        """The edits' changes to elements start .. stop of the result, float64."""
        assert job.added is not None
        source, name = job.added
        return self.plan.sources[source].read(name, start, stop)

    def _merge(self, job: Job, blocks: Blocks, coefficients: Coefficients | None, segment: int) -> None:
        size = ITEMSIZE[job.dtype]
        digest, nbytes, bad = xxhash.xxh3_128(), 0, set[str]()
        numbers, ahead = blocks.segment(segment), None
        for i in numbers:
            assert coefficients is not None
            block = blocks.load(i) if ahead is None else ahead
            merged = self._result(job, block, coefficients)
            following = i + blocks.at_once
            more = self.gpu is not None and following in numbers
            ahead = blocks.load(following) if more else None  # read and copied while the GPU merges this one
            if not block.sound(merged):  # compiled code and GPUs may give NaN other bits
                parts = [part for _, part in block.at_home().blocks()]
                results = [self._result(job, part, coefficients) for part in parts]
                bad = bad.union(*(self._check(job, *pair) for pair in zip(parts, results, strict=True)))
                merged = torch.cat(results)
            data = bytes_of(self._to_host(merged))
            self.output.write(job.name, block.start * size, data)
            digest.update(data)
            nbytes += len(data)
            self.progress(len(data))
        self.output.record(Receipt(job.name, segment, digest.hexdigest(), tuple(sorted(bad))), nbytes)

    def _copy(self, job: Job, segment: int) -> None:
        """Copy a segment of the first source; in the kernel if it is a byte range of a file."""
        model, name = job.sources[0]
        checkpoint, size = self.plan.models[model], ITEMSIZE[job.dtype]
        step, first = job.block * size, segment * job.segment_numel * size
        last = min(job.nbytes, first + job.segment_numel * size)
        digest, bad = xxhash.xxh3_128(), set[str]()
        place = checkpoint.location(name)
        shared = place and self.output.copy(job.name, first, place[0], place[1] + first, last - first)
        buffer = torch.empty(min(step, last - first), dtype=torch.uint8)
        for start in range(first, last, step):
            if self.stop.is_set():
                raise Stopped
            raw = buffer[: min(step, last - start)]
            data = bytes_of(raw)
            checkpoint.read_into(name, start // size, data)
            if not shared:
                self.output.write(job.name, start, data)
            digest.update(data)
            if job.dtype in FLOATS and not is_finite(raw.view(getattr(torch, job.dtype))):
                bad.add(self._not_finite(f"{name} of {self.names[model]}"))
            self.progress(len(data))
        self.output.record(Receipt(job.name, segment, digest.hexdigest(), tuple(sorted(bad))), last - first)

    def _check(self, job: Job, block: StoredBlock, merged: torch.Tensor) -> set[str]:
        """The names of the tensors of a block that are not finite: the inputs, else the output."""
        if block.sound(merged):
            return set()
        inputs = [
            f"{name} of {self.names[source]}"
            for source, name in job.read
            if not is_finite(self.plan.sources[source].read(name, block.start, block.start + len(merged)))
        ]
        return {self._not_finite(where) for where in inputs or [f"{job.name} of the output"]}

    def _not_finite(self, where: str) -> str:
        if self.nan == "error":
            raise FormatError(
                f"{where} holds NaN or infinity; repair the model, or use --nan warn, which records it in the lock"
            )
        return where
