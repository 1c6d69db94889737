"""Carry a plan out: tasks for workers, whose receipts go into the journal, within a budget of memory.

A tensor whose method needs no sums is merged segment by segment. One that needs sums and fits a worker's share of the
budget is read once, by one worker. A larger one, or a whole model, takes several passes that all workers share. The
bytes are the same in each case: sums run over constant blocks in a constant order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_lfm.engine.blocks import add_in_order, run_solve
from mergekit_lfm.engine.documents import Documents
from mergekit_lfm.engine.tasks import Executor, MatrixTask, MergeTask, Part, ReduceTask, Remark, Task
from mergekit_lfm.engine.threads import thread_pool
from mergekit_lfm.engine.worker import Options, Pool, Worker, refuse_nonfinite
from mergekit_lfm.errors import PlanError, reason
from mergekit_lfm.kernels.compiled import Mode
from mergekit_lfm.kernels.reductions import Reduction
from mergekit_lfm.machine.accelerators import HOST, Accelerator
from mergekit_lfm.machine.resources import default_memory
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.output.lock import LOCK
from mergekit_lfm.output.replace import Policy, already_there, is_complete
from mergekit_lfm.output.writer import Output, Receipt, finish
from mergekit_lfm.plan.budget import Budget, check_disk, workers
from mergekit_lfm.plan.job import Job
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.store.places import place_of
from mergekit_lfm.store.tensors import ITEMSIZE


@dataclass(frozen=True, slots=True)
class Execution:
    """The outcome of `execute`. resumed_bytes: written by an earlier, interrupted run. findings: one line each."""

    already_there: bool = False
    resumed_bytes: int = 0
    findings: tuple[str, ...] = ()


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
    accelerator: Accelerator = HOST,
    pool: Pool = thread_pool,
    progress: Callable[[int], None] | None = None,
) -> Execution:
    """Write the merged checkpoint to the folder `out`, or complete the output of an interrupted run of the same plan.

    The plan is ready: its downloads, alignments and edits are made. memory: bytes that the engine may hold. compile:
    "auto" compiles elementwise functions to machine code if the merge is large enough to repay it; the bytes are the
    same. accelerator: the device for the arithmetic, by default the processor; docs/gpu.md says which bytes it changes.
    pool: what workers run in. progress is called with each number of bytes newly written. OUT appears only when it is
    complete.

    Raises PlanError before anything is written if the plan is not ready, or if `out`, the memory or the disk do not
    allow it; FormatError if a document of the output cannot be written, before anything is, if an input or the result
    holds NaN or infinity (`nan="error"`), or if an input was changed meanwhile.
    """
    folder = place_of(out)
    if _already_there(plan, folder, overwrite=overwrite, resume=resume, nan=nan):
        return Execution(already_there=True)
    documents = Documents(plan, folder.name)
    documents.check()
    if resume and finish(plan.digest, plan.shards, documents.files, folder):
        return Execution(resumed_bytes=plan.bytes_written)
    budget = memory or default_memory()
    count = _check(plan, folder, budget, threads, accelerator)
    left = Budget(plan).left(budget)
    options = Options(accelerator, left // count, accelerator.room(left) // count, count, nan, compile)
    files = Output(plan.digest, plan.shards, plan.inputs, folder, resume)
    with files as output, Worker(plan, output.partial, options) as worker:
        resumed = _take_over(plan, output, nan)
        run = _Run(plan, options, output, progress or (lambda _: None))
        run.progress(resumed)
        try:
            with _explain_full_gpu(), pool(worker, count) as executor:
                run.carry_out(executor)
        finally:
            output.flush()
        output.publish({**documents.files, LOCK: documents.lock(output.done)})
    return Execution(False, resumed, (*_findings(plan, output), *sorted(run.remarks)))


def _take_over(plan: Plan, output: Output, nan: Policy) -> int:
    """The bytes that an interrupted run has written. Raises FormatError if it accepted NaN and this one does not."""
    for receipt in output.done.values():
        for where in receipt.nonfinite:
            refuse_nonfinite(where, nan)
    jobs = {job.name: job for job in plan.tensors}
    return sum(jobs[name].segment_nbytes(segment) for name, segment in output.done)


def _findings(plan: Plan, output: Output) -> Iterator[str]:
    """The warnings about a merge that was completed."""
    for where in sorted({where for receipt in output.done.values() for where in receipt.nonfinite}):
        yield f"{where} holds NaN or infinity"
    for name, why in plan.left_behind:
        yield f"{plan.labels[plan.template]}: {name} was left behind: {why}"
    for label in plan.unlisted:
        yield f"{label}: offline, so only its files in the cache were used"


@contextmanager
def _explain_full_gpu() -> Iterator[None]:
    """Raise PlanError if other processes take the GPU's memory after it was found to suffice."""
    try:
        yield
    except RuntimeError as error:  # torch, its libraries and Triton have no common class for it
        if not any(sign in str(error) for sign in ("out of memory", "ALLOC_FAILED", "NOT_INITIALIZED")):
            raise
        raise PlanError(
            f"the GPU has no memory left, or the host has none to pin ({reason(error)}): other processes have taken it "
            "since the merge began. End them, lower --threads, or use --device cpu; the same command then resumes"
        ) from None


def is_written(plan: Plan, folder: Path, *, overwrite: bool, resume: bool, nan: Policy) -> bool:
    """True if `execute` with these options has no tensor left to write. Raises PlanError if it must not write there."""
    there = _already_there(plan, folder, overwrite=overwrite, resume=resume, nan=nan)
    return there or (resume and is_complete(plan.digest, folder))


def _already_there(plan: Plan, folder: Path, *, overwrite: bool, resume: bool, nan: Policy) -> bool:
    inputs = {label: source.path for label, source in zip(plan.source_labels, plan.sources, strict=True)}
    rebuild = overwrite or not resume
    return already_there(plan.digest, plan.shards, inputs, folder, overwrite=overwrite, rebuild=rebuild, nan=nan)


def _check(plan: Plan, folder: Path, budget: int, threads: int | None, accelerator: Accelerator) -> int:
    """The number of threads. Raises PlanError if the plan is not ready, or memory, disk or inputs forbid it."""
    if plan.pending or plan.unedited or plan.absent:
        raise PlanError(
            "the recipe asks for downloads, alignments or edits before its merge; call `mergekit_lfm.merge`, which "
            "makes them, or `prepare` the plan first"
        )
    count = workers(plan, budget, threads, accelerator)
    check_copies(plan)
    check_disk(plan, folder)
    return count


@dataclass
class _Run:
    """One execution: its tasks in order, and what becomes of their results."""

    plan: Plan
    options: Options
    output: Output
    progress: Callable[[int], None]
    remarks: set[str] = field(default_factory=set)

    def carry_out(self, executor: Executor) -> None:
        """Do first all tasks that need no barrier, heavy ones first, then in file order; then those in passes."""
        waiting = [group for group in self.plan.groups if any(self._missing(i) for i in group)]
        shared = [group for group in waiting if self._takes_passes(group)]
        alone = [task for group in waiting if group not in shared for task in self._tasks(*group)]
        heavy = self.plan.bytes_written // 16
        sizes = {task.job: self.plan.tensors[task.job].nbytes for task in alone}
        alone.sort(key=lambda task: -sizes[task.job] if sizes[task.job] > heavy else 0)
        self._do(executor, [*self._matrix_tasks(), *alone])
        for group in shared:
            self._solve(executor, group)

    def _missing(self, job: int) -> tuple[int, ...]:
        """The segments of a job without a receipt."""
        name, segments = self.plan.tensors[job].name, self.plan.tensors[job].segments
        return tuple(segment for segment in range(segments) if (name, segment) not in self.output.done)

    def _takes_passes(self, group: Sequence[int]) -> bool:
        """True if a group's inputs do not fit a worker's share, so that all workers read them, once for every sum."""
        needs_sums = self.plan.tensors[group[0]].needs_sums
        return len(group) > 1 or (needs_sums and Budget(self.plan).resident(group) > self.options.device_share)

    def _matrix_tasks(self) -> Iterator[MatrixTask]:
        groups = self.plan.matrices
        for number in sorted(range(len(groups)), key=lambda number: -groups[number].nbytes):
            segments = {i: self._missing(i) for i in groups[number].jobs}
            if any(segments.values()):
                yield MatrixTask(number, segments)

    def _tasks(self, i: int) -> Iterator[MergeTask]:
        """The tasks of a job that is merged alone, without passes."""
        job, missing = self.plan.tensors[i], self._missing(i)
        if job.needs_sums:
            yield MergeTask(i, missing, solve=True)
            return
        coefficients = None if job.copied else run_solve(METHODS[job.method].solve(self.plan.unit([job])), _no_sums)
        parts = [missing] if Budget(self.plan).by_one_worker(job) else [(segment,) for segment in missing]
        for part in parts:
            yield MergeTask(i, part, coefficients)

    def _solve(self, executor: Executor, group: Sequence[int]) -> None:
        """Solve a group in passes: one over its inputs for each reduction, one to apply."""
        jobs = [self.plan.tensors[i] for i in group]
        places = [(i, segment) for i, job in zip(group, jobs, strict=True) for segment in range(job.segments)]

        def over(request: Reduction) -> Any:
            tasks = [ReduceTask(number, *place, request) for number, place in enumerate(places)]
            parts = ((part.number, part.value) for part in self._results(executor, tasks))
            return add_in_order(request, parts)

        coefficients = run_solve(METHODS[jobs[0].method].solve(self.plan.unit(jobs)), over)
        self._do(executor, [MergeTask(i, (segment,), coefficients) for i in group for segment in self._missing(i)])

    def _do(self, executor: Executor, tasks: Iterable[Task]) -> None:
        for part in self._results(executor, tasks):
            raise AssertionError(f"{part} of a sum that nobody requested")

    def _results(self, executor: Executor, tasks: Iterable[Task]) -> Iterator[Part]:
        """Do the tasks, keep their receipts and remarks, and give the parts of a sum."""
        for result in executor(tasks):
            match result:
                case Part():
                    yield result
                case Remark():
                    self.remarks.add(result.text)
                case Receipt():
                    self._record(result)

    def _record(self, receipt: Receipt) -> None:
        """Journal a receipt, unless it has come before: from a worker that was lost after it had sent it."""
        if (receipt.tensor, receipt.segment) not in self.output.done:
            nbytes = self.jobs[receipt.tensor].segment_nbytes(receipt.segment)
            self.output.record(receipt, nbytes)
            self.progress(nbytes)

    @cached_property
    def jobs(self) -> dict[str, Job]:
        """The plan's jobs by the names of their tensors."""
        return {job.name: job for job in self.plan.tensors}


def _no_sums(_: Reduction) -> Any:
    raise AssertionError("the plan says that this solve asks for no reduction")


def check_copies(plan: Plan) -> None:
    """Raise PlanError if a tensor that is copied differs between models. Compares them before anything is written."""
    problems = [
        f"{job.spec} differs between {plan.labels[job.sources[0][0]]} and {plan.labels[model]}"
        for job in plan.tensors
        if job.copied
        for model, name in job.sources[1:]
        if not _same_bytes(plan, job.sources[0], (model, name), job.nbytes)
    ]
    if problems:
        raise PlanError("tensors that are not floating are copied, so they must be equal:\n  " + "\n  ".join(problems))


def _same_bytes(plan: Plan, one: tuple[int, str], other: tuple[int, str], nbytes: int) -> bool:
    step = 1 << 22
    sides = [(plan.models[model], name, bytearray(min(step, nbytes))) for model, name in (one, other)]
    for start in range(0, nbytes, step):
        for model, name, buffer in sides:
            model.read_into(name, start // ITEMSIZE[model[name].dtype], memoryview(buffer)[: nbytes - start])
        if sides[0][2] != sides[1][2]:
            return False
    return True
