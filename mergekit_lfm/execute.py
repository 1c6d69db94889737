"""Carries out a plan: reads blocks, merges, writes segments, with a pool of threads and within a budget of memory.

A tensor whose method needs no sums is worked on by segments; one that needs sums and fits a worker's share of the
budget is read once and done by one worker; a larger one, or a whole model, takes several passes that all workers
share. The bytes are the same in each case: sums run over constant blocks in a constant order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import torch
import xxhash

from mergekit_lfm.blocks import Blocks, Read, StoredBlock, apply_to, finite, in_order, making_on, solved
from mergekit_lfm.errors import FormatError, PlanError, reason
from mergekit_lfm.evidence import LinearGroup, LinearJob
from mergekit_lfm.jobs import Job, Source
from mergekit_lfm.kernels.block import BLOCK, SEGMENT, Coefficients
from mergekit_lfm.kernels.compiled import Kernels, Mode
from mergekit_lfm.kernels.gpu import GpuKernels
from mergekit_lfm.kernels.reductions import Reduction
from mergekit_lfm.kernels.sums import round_once
from mergekit_lfm.linears import StoredLinear
from mergekit_lfm.machine.accelerators import CHUNK, Accelerator, name_of
from mergekit_lfm.machine.resources import allow_many_files, default_memory, keep_freed_memory
from mergekit_lfm.methods import METHODS
from mergekit_lfm.output.writer import Output, Policy, Receipt, already_there, finish
from mergekit_lfm.plan import Plan
from mergekit_lfm.pool import Executor, Stopped, thread_pool
from mergekit_lfm.preflight import check_copies, check_disk, workers
from mergekit_lfm.provenance import documents, names_of
from mergekit_lfm.store.formats import bytes_of
from mergekit_lfm.store.tensors import FLOATS, ITEMSIZE

HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `execute` did. resumed_bytes: written by an earlier, interrupted run. warnings: one line each."""

    path: Path
    already_there: bool = False
    resumed_bytes: int = 0
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Work:
    """What one worker does without waiting: all segments of a job that needs sums, or some of one that does not."""

    job: Job
    segments: tuple[int, ...]
    coefficients: Coefficients | None = None
    solve: bool = False


@dataclass(frozen=True, slots=True)
class LinearWork:
    """What one worker does without waiting: linear layers that are solved together, all but what is written already."""

    group: LinearGroup
    missing: Mapping[str, tuple[int, ...]]


@dataclass
class Run:
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

    def blocks(self, job: Job, resident: bool = False) -> Blocks:
        """The job's inputs, read from the files block by block or held in memory: the processor's, or the GPU's."""
        ranges = at_once = 1
        if self.gpu is not None:
            ranges = at_once = self._fitting(job, min(self.share - self.plan.views(job), self.device_share))
            if resident:  # of a chunk there only the result is in the host's memory, pinned and rounded up
                result = job.block * ITEMSIZE[job.dtype]
                at_once = self._fitting(job, self.device_share, min(SEGMENT, self.share // (4 * result)))
        readers = {source: self._reader(source, job.block * ranges, resident) for source in job.read}
        base = readers[job.base] if job.base else None
        sources = [readers[source] for source in job.sources + job.statistics]
        dtype = getattr(torch, job.compute)
        return Blocks(sources, base, job.spec.numel, job.block, dtype, self.kernels, self.gpu, at_once)

    def _fitting(self, job: Job, nbytes: int, most: int = CHUNK) -> int:
        """How many blocks of a job are worked on at once in so many bytes: a divisor of SEGMENT."""
        return 1 << (max(1, min(most, nbytes // max(1, self.plan.working(job)))).bit_length() - 1)

    def _reader(self, source: tuple[int, str], most: int, resident: bool) -> Read:
        """Reads ranges of up to `most` elements: into memory that the next call may overwrite, or once the whole."""
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
                if number % 2:  # one range is read while another is copied, and no more of them is pinned
                    self.gpu.settle()
        return lambda start, stop: whole[start:stop]

    def missing(self, job: Job) -> tuple[int, ...]:
        """The segments that the journal does not vouch for."""
        return tuple(s for s in range(job.segments) if (job.name, s) not in self.output.done)

    def take_over(self) -> int:
        """The bytes that an earlier run has written, of which the progress is told; its findings are this run's."""
        for receipt in self.output.done.values():
            for where in receipt.nonfinite:
                self._not_finite(where)
        jobs = {job.name: job for job in self.plan.tensors}
        done = sum(jobs[name].segment_nbytes(segment) for name, segment in self.output.done)
        self.progress(done)
        return done

    def do(self, work: Work | LinearWork) -> None:
        """Merge or copy the segments of `work`, write them, and note the receipts."""
        with self._working():
            self._do(work)

    def _working(self) -> AbstractContextManager[None]:
        """Within, a worker computes on the GPU, if there is one."""
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
            coefficients = solved(METHODS[job.method].solve(self.plan.unit([job])), blocks.reduce)
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
            with nullcontext() if self.gpu is None else making_on(self.gpu.device):
                merged = next(merging)
            for part in (part for part in layer.parts(merged) if part is not None):
                job = next(waiting)
                tensor = self._finished(job, 0, part)
                if not finite(tensor) and not bad:
                    bad.add(self._not_finite(f"{job.name} of the output"))
                for segment in work.missing[job.name]:
                    first = segment * job.segment_numel
                    data = bytes_of(tensor[first : first + job.segment_numel])
                    self.output.write(job, first * ITEMSIZE[job.dtype], data)
                    digest = xxhash.xxh3_128_hexdigest(data)
                    self.progress(len(data))
                    self.output.record(Receipt(job.name, segment, digest, tuple(sorted(bad))), len(data))

    def _linear(self, group: LinearGroup, layer: LinearJob, bad: set[str]) -> StoredLinear:
        """A layer whose parts are read from the files; what of them is not finite is added to `bad`."""
        weight = self.plan.tensors[layer.weight]

        def read(source: Source, start: int, stop: int) -> torch.Tensor:
            if self.stop.is_set():
                raise Stopped
            with nullcontext() if self.gpu is None else making_on(HOST):
                part = self.plan.sources[source[0]].read(source[1], start, stop)
            if not finite(part):
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
        """The merged block, with what edits add to it, in the output's dtype."""
        method, exact = METHODS[job.method], job.added is not None
        merged = apply_to(block, method, coefficients, getattr(torch, job.compute if exact else job.dtype))
        return self._finished(job, block.start, merged) if exact else merged

    def _finished(self, job: Job, start: int, merged: torch.Tensor) -> torch.Tensor:
        """Elements from `start` on, with what edits add to them, in the output's dtype and the processor's memory."""
        dtype = getattr(torch, job.dtype)
        if job.added is None:
            return self._home(round_once(merged, dtype))
        return round_once(self._home(merged).double() + self._added(job, start, start + len(merged)), dtype)

    def _home(self, x: torch.Tensor) -> torch.Tensor:
        """x in the processor's memory."""
        return x if self.gpu is None or x.is_cpu else self.gpu.down(x)

    def _added(self, job: Job, start: int, stop: int) -> torch.Tensor:
        """What edits add to elements start .. stop of the result, float64."""
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
            data = bytes_of(self._home(merged))
            self.output.write(job, block.start * size, data)
            digest.update(data)
            nbytes += len(data)
            self.progress(len(data))
        self.output.record(Receipt(job.name, segment, digest.hexdigest(), tuple(sorted(bad))), nbytes)

    def _copy(self, job: Job, segment: int) -> None:
        """Copy a segment of the first source, in the kernel where it lies in a file as it is."""
        model, name = job.sources[0]
        checkpoint, size = self.plan.models[model], ITEMSIZE[job.dtype]
        file = checkpoint.file_of(name)
        step, first = job.block * size, segment * job.segment_numel * size
        last = min(job.nbytes, first + job.segment_numel * size)
        digest, bad = xxhash.xxh3_128(), set[str]()
        offset = file.offset(name)
        shared = offset is not None and self.output.copy(job, first, file.fileno(), offset + first, last - first)
        buffer = torch.empty(min(step, last - first), dtype=torch.uint8)
        for start in range(first, last, step):
            if self.stop.is_set():
                raise Stopped
            raw = buffer[: min(step, last - start)]
            data = bytes_of(raw)
            file.read_into(name, start, data)
            if not shared:
                self.output.write(job, start, data)
            digest.update(data)
            if job.dtype in FLOATS and not finite(raw.view(getattr(torch, job.dtype))):
                bad.add(self._not_finite(f"{name} of {self.names[model]}"))
            self.progress(len(data))
        self.output.record(Receipt(job.name, segment, digest.hexdigest(), tuple(sorted(bad))), last - first)

    def _check(self, job: Job, block: StoredBlock, merged: torch.Tensor) -> set[str]:
        """What in a block is not finite: of the inputs, else of the result."""
        if block.sound(merged):
            return set()
        inputs = [
            f"{name} of {self.names[source]}"
            for source, name in job.read
            if not finite(self.plan.sources[source].read(name, block.start, block.start + len(merged)))
        ]
        return {self._not_finite(where) for where in inputs or [f"{job.name} of the output"]}

    def _not_finite(self, where: str) -> str:
        if self.nan == "error":
            raise FormatError(
                f"{where} holds NaN or infinity; repair the model, or use --nan warn, which notes it in the lock"
            )
        return where


def execute(
    plan: Plan,
    out: Path,
    *,
    memory: int | None = None,
    threads: int | None = None,
    nan: Policy = "error",
    resume: bool = True,
    overwrite: bool = False,
    compile: Mode = "auto",
    gpu: Accelerator | None = None,
    progress: Callable[[int], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> Outcome:
    """Write the merged checkpoint to the folder `out`, or complete what an interrupted run of the same plan left.

    memory: bytes that the engine may hold. compile: whether elementwise functions are compiled to machine code,
    "auto" where the merge is large enough to repay it; the bytes are the same. gpu: where arithmetic runs instead of on
    the processor; docs/gpu.md says what that changes of the bytes. progress is called with each number of bytes newly
    written, notice with a line about each alignment that is found before. Raises PlanError before anything is written
    where `out`, the memory or the disk do not allow it; FormatError where an input turns out to hold NaN or infinity
    (`nan="error"`). OUT appears only when it is complete.
    """
    started = time.monotonic()
    place = out.resolve()
    if gpu is not None and plan.pending:
        from mergekit_lfm.stages import noted

        plan = noted(plan, name_of(gpu))
    if already_there(plan, place, overwrite=overwrite, rebuild=overwrite and not resume, nan=nan):
        return Outcome(out, already_there=True)
    if resume and finish(plan, place):
        return Outcome(out, resumed_bytes=plan.bytes_written, seconds=time.monotonic() - started)
    budget = memory or default_memory()
    plan, count = _checked(plan, place, budget, threads, gpu, notice or (lambda _: None))
    keep_freed_memory()
    allow_many_files()
    with Output(plan, place, resume) as output, _kernels(plan, compile, count, gpu) as kernels:
        names = names_of(plan)
        run = Run(
            plan,
            output,
            share=plan.share(budget, count),
            nan=nan,
            progress=progress or (lambda _: None),
            kernels=kernels,
            names=tuple(names[label] for label in plan.source_labels),
            gpu=gpu,
            device_share=gpu.room() // count if gpu else 0,
        )
        resumed = run.take_over()
        try:
            with _telling_of_room(), thread_pool(count, run.stop) as executor:
                _carry_out(run, executor)
        finally:
            output.flush()
        output.publish(documents(plan, output.done))
    lines = (*_findings(plan, output), *sorted(kernels.problems))
    return Outcome(out, False, resumed, lines, time.monotonic() - started)


def _findings(plan: Plan, output: Output) -> Iterator[str]:
    """What a user has to know of a merge that was done all the same."""
    for where in sorted({where for receipt in output.done.values() for where in receipt.nonfinite}):
        yield f"{where} holds NaN or infinity"
    for label in plan.unlisted:
        yield f"{label}: offline, only those of its files that are in the cache count"


def _kernels(plan: Plan, compile: Mode, threads: int, gpu: Accelerator | None) -> Kernels | GpuKernels:
    numels = [job.spec.numel for job in plan.tensors if not job.copied]
    if gpu is not None:
        return GpuKernels(compile, sum(numels), gpu.device)
    return Kernels(compile, sum(numel // BLOCK for numel in numels), BLOCK, threads)


@contextmanager
def _telling_of_room() -> Iterator[None]:
    """PlanError where a GPU's memory is taken by others after it was found to suffice."""
    try:
        yield
    except RuntimeError as error:  # of torch, its libraries and Triton, which have no class for it in common
        if not any(sign in str(error) for sign in ("out of memory", "ALLOC_FAILED", "NOT_INITIALIZED")):
            raise
        raise PlanError(
            f"the GPU has no memory left, or the host none to pin ({reason(error)}): others have taken it since the "
            "merge began. End them, lower --threads, or use --device cpu; the same command goes on from what is done"
        ) from None


def _checked(
    plan: Plan,
    place: Path,
    budget: int,
    threads: int | None,
    gpu: Accelerator | None,
    notice: Callable[[str], None],
) -> tuple[Plan, int]:
    """The plan with its alignments found, and the number of threads. PlanError where memory, disk or inputs forbid it.

    What can be known before the alignments is refused before them.
    """
    if plan.unedited:
        raise PlanError(
            "the recipe asks for facts to be edited, which needs a model that runs, before its merge; call "
            "`mergekit_lfm.merge`, or give patch files"
        )
    if plan.pending or plan.absent:
        from mergekit_lfm.stages import prepare

        plan.peak_memory(budget, threads or 1)
        check_disk(plan, place)
        plan.fetch(notice)
        plan = prepare(plan, notice, name_of(gpu)) if plan.pending else plan
    count = workers(plan, budget, threads, gpu)
    check_copies(plan)
    check_disk(plan, place)
    return plan, count


def _carry_out(run: Run, executor: Executor) -> None:
    """First all tasks that need no barrier, heavy ones first, then in file order; then what takes several passes."""
    plan = run.plan
    alone: list[Work] = []
    if run.gpu is not None and plan.linears:
        run.gpu.load_solvers()
    linears = [_linear_work(run, group) for group in sorted(plan.linears, key=lambda group: -group.nbytes)]
    for _ in executor(run.do, [work for work in linears if any(work.missing.values())]):
        pass
    shared: list[list[Job]] = []
    for group in plan.groups:
        jobs = [plan.tensors[i] for i in group]
        missing = {job.name: run.missing(job) for job in jobs}
        if not any(missing.values()):
            continue
        if len(jobs) > 1 or (
            jobs[0].needs_sums and plan.resident(group) > (run.device_share if run.gpu else run.share)
        ):
            shared.append(jobs)
        elif jobs[0].needs_sums:
            alone.append(Work(jobs[0], missing[jobs[0].name], solve=True))
        else:
            coefficients = None if jobs[0].copied else solved(METHODS[jobs[0].method].solve(plan.unit(jobs)), _no_sums)
            segments = missing[jobs[0].name]
            parts = [segments] if plan.at_once(jobs[0]) else [(segment,) for segment in segments]
            alone += [Work(jobs[0], part, coefficients) for part in parts]
    heavy = plan.bytes_written // 16
    alone.sort(key=lambda work: -work.job.nbytes if work.job.nbytes > heavy else 0)
    for _ in executor(run.do, alone):
        pass
    for jobs in shared:
        _in_passes(run, executor, jobs)


def _linear_work(run: Run, group: LinearGroup) -> LinearWork:
    jobs = [run.plan.tensors[i] for i in group.jobs]
    return LinearWork(group, {job.name: run.missing(job) for job in jobs})


def _in_passes(run: Run, executor: Executor, jobs: Sequence[Job]) -> None:
    """Solve a group that does not fit a worker's share: one pass over its inputs for each reduction, one to apply."""
    tasks = [(job, segment) for job in jobs for segment in range(job.segments)]

    def over(request: Reduction) -> Any:
        parts = executor(lambda i: (i, run.reduce(tasks[i][0], request, tasks[i][1])), range(len(tasks)))
        return in_order(request, parts)

    method = METHODS[jobs[0].method]
    coefficients = solved(method.solve(run.plan.unit(jobs)), over)
    works = [Work(job, (segment,), coefficients) for job in jobs for segment in run.missing(job)]
    for _ in executor(run.do, works):
        pass


def _no_sums(_: Reduction) -> Any:
    raise AssertionError("the plan says that this solve asks for nothing")
