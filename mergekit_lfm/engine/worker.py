"""One worker: merges, copies or solves the tensors of a task, writes their bytes, and returns receipts for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Event

import torch
import xxhash

from mergekit_lfm.engine.batches import merge_alike, sort_alike
from mergekit_lfm.engine.blocks import Blocks, StoredBlock, apply_to, default_device, is_finite, run_solve
from mergekit_lfm.engine.digests import SegmentDigests, is_verbatim
from mergekit_lfm.engine.matrices import StoredMatrices
from mergekit_lfm.engine.public import names_of
from mergekit_lfm.engine.tasks import BatchTask, Executor, MatrixTask, MergeTask, Part, ReduceTask, Remark, Result, Task
from mergekit_lfm.errors import FormatError
from mergekit_lfm.kernels.block import Coefficients
from mergekit_lfm.kernels.compiled import Mode
from mergekit_lfm.kernels.gpu import make_kernels
from mergekit_lfm.kernels.random import Known
from mergekit_lfm.kernels.sums import round_once
from mergekit_lfm.machine.accelerators import Accelerator, ReadRange
from mergekit_lfm.machine.resources import allow_many_files, keep_freed_memory
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.output.journal import Receipt
from mergekit_lfm.output.replace import Policy
from mergekit_lfm.output.shards import NoFiles, ShardFiles
from mergekit_lfm.plan.budget import Budget
from mergekit_lfm.plan.job import Job
from mergekit_lfm.plan.matrices import MatrixJob
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.plan.roles import TensorRef
from mergekit_lfm.store.formats import bytes_of
from mergekit_lfm.store.tensors import FLOATS, ITEMSIZE

HOST = torch.device("cpu")

Digests = Mapping[TensorRef, SegmentDigests]  # of the tensors that a task reads


class Stopped(Exception):
    """Another worker failed, or the user interrupted: this worker stops at its next block."""


@dataclass(frozen=True, slots=True)
class Options:
    """How all workers of an execution work. share, device_share: bytes that each may hold, on the host and the device.

    threads: the number of workers. nan: what to do about NaN and infinity. compile: as of `execute`.
    """

    accelerator: Accelerator
    share: int
    device_share: int
    threads: int
    nan: Policy
    compile: Mode

    @classmethod
    def of(cls, accelerator: Accelerator, left: int, threads: int, nan: Policy, compile: Mode) -> Options:
        """The options of workers that have the same share of `left` bytes."""
        return cls(accelerator, left // threads, accelerator.room(left) // threads, threads, nan, compile)


class Worker:
    """Does tasks of a plan, for several threads at once. Use as a context manager.

    Picklable: a copy in another process opens the inputs and the shards in `folder` for itself. folder: None to write
    nothing. stop: set it to end all tasks at their next block.
    """

    def __init__(self, plan: Plan, folder: Path | None, options: Options) -> None:
        self.plan, self.folder, self.options = plan, folder, options
        self.stop = Event()
        self._accelerator = options.accelerator
        self._budget = Budget(plan)
        self._shards = NoFiles() if folder is None else ShardFiles(folder, plan.shards)
        numels = [job.spec.numel for job in plan.tensors if not job.copied]
        self._kernels = make_kernels(self._accelerator, options.compile, numels, options.threads)
        self._remarks = set[str]()

    def __reduce__(self) -> tuple[type[Worker], tuple[Plan, Path | None, Options]]:
        return Worker, (self.plan, self.folder, self.options)

    def __enter__(self) -> Worker:
        keep_freed_memory()
        allow_many_files()
        if self.plan.matrices:
            self._accelerator.load_solvers()
        self._kernels.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._kernels.__exit__()
        self._shards.close()

    def run(self, task: Task) -> Iterator[Result]:
        """Do a task: the receipts of the segments it wrote, or its part of a sum, and remarks not made before.

        Raises FormatError for NaN or infinity unless the options accept them; Stopped after `stop` is set.
        """
        with self._accelerator.stream():
            match task:
                case MergeTask():
                    yield from self._merge_segments(task)
                case BatchTask():
                    yield from self._merge_batch(task)
                case MatrixTask():
                    yield from self._merge_matrices(task)
                case ReduceTask():
                    blocks = self._blocks(self.plan.tensors[task.job])
                    yield Part(task.number, blocks.reduce_segment(task.request, task.segment))
        for text in sorted(self._kernels.problems - self._remarks):
            self._remarks.add(text)
            yield Remark(text)

    def sync(self) -> None:
        """Bring to the disk what this worker has written."""
        self._shards.sync()

    @cached_property
    def _names(self) -> tuple[str, ...]:
        """The public name of each of the plan's sources."""
        names = names_of(self.plan)
        return tuple(names[label] for label in self.plan.source_labels)

    def _blocks(
        self, job: Job, digests: Digests | None = None, *, resident: bool = False, in_parts: bool = False
    ) -> Blocks:
        """The job's inputs, read from the files block by block, or held on the device.

        digests: of the inputs. in_parts: the blocks are not reduced, so that they may be read in parts.
        """
        options, device = self.options, self._accelerator
        room = min(options.share - self._budget.views(job), options.device_share)
        read = self._count_blocks(job, room, device.chunk)
        at_once, part = read, self._budget.part(job, room) if in_parts and not device.by_chunk else None
        if resident:  # then the host's memory holds only a chunk's result, pinned and rounded up
            result = job.block * ITEMSIZE[job.dtype]
            most = min(device.resident_chunk, options.share // (4 * result))
            at_once = self._count_blocks(job, options.device_share, most)
        most = part or job.block * read
        readers = {
            source: self._reader(source, None if digests is None else digests[source], most, resident)
            for source in job.inputs
        }
        base = readers[job.base] if job.base else None
        sources = [readers[source] for source in job.sources + job.statistics]
        dtype = getattr(torch, job.compute)
        known: Known | None = {} if resident and not device.by_chunk else None
        return Blocks(sources, base, job.spec.numel, job.block, dtype, self._kernels, device, at_once, part, known)

    def _count_blocks(self, job: Job, nbytes: int, most: int) -> int:
        """Blocks per chunk that fit in `nbytes`, at most `most`: a power of two that divides SEGMENT."""
        return 1 << (max(1, min(most, nbytes // max(1, self._budget.device_scratch(job)))).bit_length() - 1)

    def _digests(self, job: Job) -> dict[TensorRef, SegmentDigests]:
        """The digests of the job's inputs."""
        return {ref: SegmentDigests(self.plan.sources[ref[0]], ref[1], job.segment_numel) for ref in job.inputs}

    def _reader(self, source: TensorRef, digests: SegmentDigests | None, most: int, resident: bool) -> ReadRange:
        """A reader of ranges of up to `most` elements, which the next call may overwrite; resident: reads all once."""
        model, name = self.plan.sources[source[0]], source[1]
        numel, dtype = model[name].numel, getattr(torch, model[name].dtype)

        def fill(start: int, into: torch.Tensor) -> None:
            self._check_stop()
            data = bytes_of(into)
            model.read_into(name, start, data)
            if digests is not None:
                digests.add(start, data)

        if not resident:
            return self._accelerator.reader(min(most, numel), dtype, fill)
        whole = self._accelerator.load(numel, most, dtype, fill)
        return lambda start, stop: whole[start:stop]

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise Stopped

    def _merge_segments(self, task: MergeTask) -> Iterator[Receipt]:
        job = self.plan.tensors[task.job]
        if job.copied:
            for segment in task.segments:
                yield from self._copy(job, segment)
            return
        digests = self._digests(job)
        blocks = self._blocks(job, digests, resident=task.solve, in_parts=not task.solve)
        coefficients = task.coefficients
        if task.solve and job.spec.numel:
            coefficients = run_solve(METHODS[job.method].solve(self.plan.unit([job])), blocks.reduce)
        for segment in task.segments:
            xxh3, bad = self._merge(job, blocks, coefficients, segment)
            yield from _receipts(job, segment, xxh3, bad, [digests[source].take(segment) for source in job.inputs])

    def _merge_batch(self, task: BatchTask) -> Iterator[Receipt]:
        """Those that are alike at once, or one after another if an element is not finite."""
        jobs = {self.plan.tensors[i].name: i for i in task.jobs}
        for alike in sort_alike(self.plan, task.jobs):
            self._check_stop()
            batch = merge_alike(self.plan, alike, self._kernels)
            if batch is None:
                singles = (MergeTask(jobs[job.name], (0,), solve=True) for job in alike)
                yield from (receipt for single in singles for receipt in self._merge_segments(single))
                continue
            self._shards.write_all((job.spec for job in alike), bytes_of(batch.merged))
            for job, digest, inputs in batch.digests(alike):
                yield from _receipts(job, 0, digest, (), inputs)

    def _merge_matrices(self, task: MatrixTask) -> Iterator[Receipt]:
        bad = set[str]()
        group = self.plan.matrices[task.group]
        digests = {source: found for i in group.jobs for source, found in self._digests(self.plan.tensors[i]).items()}
        digests |= {gram: SegmentDigests(self.plan.sources[gram[0]], gram[1]) for gram in group.grams}
        matrices = [self._stored(matrix, digests, bad) for matrix in group.matrices]
        unit = self.plan.unit([self.plan.tensors[group.jobs[0]]])
        whole = METHODS[self.plan.tensors[group.jobs[0]].method].whole
        assert whole is not None
        merging = whole.merge(unit, matrices)
        for matrix in matrices:
            with default_device(self._accelerator.device):
                merged = next(merging)
            for i, part in zip(matrix.job.jobs, matrix.parts(merged), strict=True):
                job = self.plan.tensors[i]
                tensor = self._finish(job, 0, part)
                if not is_finite(tensor) and not bad:
                    bad.add(self._not_finite(f"{job.name} of the output"))
                for segment in task.segments[i]:
                    first = segment * job.segment_numel
                    data = bytes_of(tensor[first : first + job.segment_numel])
                    self._write(job, first * ITEMSIZE[job.dtype], data)
                    read = [digests[source].take(segment) for source in job.inputs]
                    if segment == 0:
                        read += [digests[gram].take(0) for gram in self.plan.grams.get(job.name, ())]
                    yield from _receipts(job, segment, xxhash.xxh3_128_hexdigest(data), bad, read)

    def _stored(self, matrix: MatrixJob, digests: Digests, bad: set[str]) -> StoredMatrices:
        """A matrix whose tensors are read from the files on demand; adds the names of those not finite to `bad`."""

        def read(source: TensorRef, start: int, stop: int) -> torch.Tensor:
            self._check_stop()
            with default_device(HOST):
                part = self.plan.sources[source[0]].read(source[1], start, stop)
            digests[source].add(start, bytes_of(part))
            if not is_finite(part):
                bad.add(self._not_finite(f"{source[1]} of {self._names[source[0]]}"))
            return part

        return StoredMatrices(read, matrix)

    def _result(self, job: Job, block: StoredBlock, coefficients: Coefficients) -> torch.Tensor:
        """The merged block plus the edits' changes, in the output's dtype."""
        method, edited = METHODS[job.method], job.added is not None
        merged = apply_to(block, method, coefficients, getattr(torch, job.compute if edited else job.dtype))
        return self._finish(job, block.start, merged) if edited or job.match.kept is not None else merged

    def _finish(self, job: Job, start: int, merged: torch.Tensor) -> torch.Tensor:
        """Elements from `start` on plus the edits' changes, in the output's dtype and the processor's memory."""
        dtype = getattr(torch, job.dtype)
        if job.added is None:
            return self._keep_rows(job, start, self._accelerator.down(round_once(merged, dtype)))
        changes = self._read_changes(job, start, start + len(merged))
        return self._keep_rows(job, start, round_once(self._accelerator.down(merged).double() + changes, dtype))

    def _keep_rows(self, job: Job, start: int, result: torch.Tensor) -> torch.Tensor:
        """Elements from `start` on with the template's in place of those beyond the rows that all models have."""
        kept = len(result) if job.match.kept is None else max(0, job.match.kept - start)
        if kept < len(result):
            assert job.match.rest is not None
            model, name = job.match.rest
            rows = self.plan.models[model].read(name, start + kept, start + len(result))
            result[kept:] = rows.to(result.dtype)
        return result

    def _read_changes(self, job: Job, start: int, stop: int) -> torch.Tensor:
        """The edits' changes to elements start .. stop of the result, float64."""
        assert job.added is not None
        source, name = job.added
        return self.plan.sources[source].read(name, start, stop)

    def _merge(self, job: Job, blocks: Blocks, coefficients: Coefficients | None, segment: int) -> tuple[str, set[str]]:
        """Write a segment; the xxh3-128 of its bytes, and the names of tensors that are not finite."""
        size = ITEMSIZE[job.dtype]
        digest, bad = xxhash.xxh3_128(), set[str]()
        pieces, ahead = blocks.pieces(segment), None
        for number, piece in enumerate(pieces, 1):
            block = blocks.load_range(*piece) if ahead is None else ahead
            if job.by_row:
                coefficients = blocks.solve_rows(METHODS[job.method], self.plan.unit([job]), block)
            assert coefficients is not None
            merged = self._result(job, block, coefficients)
            more = self._accelerator.reads_ahead and number < len(pieces)
            ahead = blocks.load_range(*pieces[number]) if more else None  # copied while the device merges this one
            if not block.is_finite_with(merged):  # compiled code and GPUs may give NaN other bits
                parts = [part for _, part in block.copy_to_host().blocks()]
                results = [self._result(job, part, coefficients) for part in parts]
                bad = bad.union(*(self._check(job, *pair) for pair in zip(parts, results, strict=True)))
                merged = torch.cat(results)
            data = bytes_of(self._accelerator.down(merged))
            self._write(job, block.start * size, data)
            digest.update(data)
        return digest.hexdigest(), bad

    def _write(self, job: Job, start: int, data: memoryview) -> None:
        """Write bytes of the job's result from byte `start` on, under each of its names."""
        for name in job.names:
            self._shards.write(name, start, data)

    def _copy(self, job: Job, segment: int) -> Iterator[Receipt]:
        """Copy a segment of the first source; in the kernel if it is a byte range of a file."""
        model, name = job.sources[0]
        checkpoint, size = self.plan.models[model], ITEMSIZE[job.dtype]
        step, first = job.block * size, segment * job.segment_numel * size
        last = min(job.nbytes, first + job.segment_numel * size)
        digest, bad = xxhash.xxh3_128(), set[str]()
        place = None if job.match.kind == "counter" else checkpoint.location(name)
        shared = place and all(
            self._shards.copy(each, first, place[0], place[1] + first, last - first) for each in job.names
        )
        buffer = torch.empty(min(step, last - first), dtype=torch.uint8)
        for start in range(first, last, step):
            self._check_stop()
            raw = buffer[: min(step, last - start)]
            data = bytes_of(raw)
            checkpoint.read_into(name, start // size, data)
            if job.match.kind == "counter":
                self._take_largest(job, start // size, raw.view(getattr(torch, job.dtype)))
            if not shared:
                self._write(job, start, data)
            digest.update(data)
            if (
                job.dtype in FLOATS
                and job.match.kind != "constant"
                and not is_finite(raw.view(getattr(torch, job.dtype)))
            ):
                bad.add(self._not_finite(f"{name} of {self._names[model]}"))
        inputs = [] if is_verbatim(self.plan, job) else [each.take(segment) for each in self._digests(job).values()]
        yield from _receipts(job, segment, digest.hexdigest(), bad, inputs)

    def _take_largest(self, job: Job, start: int, values: torch.Tensor) -> None:
        """Raise the values from element `start` on to the largest of all sources."""
        for model, name in job.sources[1:]:
            other = self.plan.models[model].read(name, start, start + len(values))
            torch.maximum(values, other.to(values.dtype), out=values)

    def _check(self, job: Job, block: StoredBlock, merged: torch.Tensor) -> set[str]:
        """The names of the tensors of a block that are not finite: the inputs, else the output."""
        if block.is_finite_with(merged):
            return set()
        inputs = [
            f"{name} of {self._names[source]}"
            for source, name in job.inputs
            if not is_finite(self.plan.sources[source].read(name, block.start, block.start + len(merged)))
        ]
        return {self._not_finite(where) for where in inputs or [f"{job.name} of the output"]}

    def _not_finite(self, where: str) -> str:
        refuse_nonfinite(where, self.options.nan)
        return where


def _receipts(job: Job, segment: int, digest: str, bad: Iterable[str], inputs: Iterable[str] = ()) -> Iterator[Receipt]:
    """The receipts of a segment, one for each name under which it was written."""
    inputs = tuple(inputs)
    yield from (Receipt(name, segment, digest, tuple(sorted(bad)), inputs) for name in job.names)


Pool = Callable[[Worker, int], AbstractContextManager[Executor]]  # an executor of so many workers at once


def refuse_nonfinite(where: str, nan: Policy) -> None:
    """Raise FormatError about NaN or infinity unless the policy accepts it."""
    if nan == "error":
        raise FormatError(
            f"{where} holds NaN or infinity; repair the model, or use --nan warn, which records it in the lock"
        )
