"""Carry a plan out: read blocks, merge, write segments, with a pool of threads and within a budget of memory.

A tensor whose method needs no sums is merged segment by segment. One that needs sums and fits a worker's share of the
budget is read once, by one worker. A larger one, or a whole model, takes several passes that all workers share. The
bytes are the same in each case: sums run over constant blocks in a constant order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lfm.engine.blocks import add_in_order, run_solve
from mergekit_lfm.engine.documents import documents, names_of
from mergekit_lfm.engine.threads import Executor, thread_pool
from mergekit_lfm.engine.worker import LinearWork, Work, Worker
from mergekit_lfm.errors import PlanError, reason
from mergekit_lfm.kernels.block import BLOCK
from mergekit_lfm.kernels.compiled import Kernels, Mode
from mergekit_lfm.kernels.gpu import GpuKernels
from mergekit_lfm.kernels.reductions import Reduction
from mergekit_lfm.machine.accelerators import Accelerator
from mergekit_lfm.machine.resources import allow_many_files, default_memory, keep_freed_memory
from mergekit_lfm.methods import METHODS
from mergekit_lfm.output.writer import Output, Policy, already_there, finish, is_complete
from mergekit_lfm.plan.budget import Budget, check_disk, workers
from mergekit_lfm.plan.job import Job
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.plan.statistics import LinearGroup
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
    gpu: Accelerator | None = None,
    progress: Callable[[int], None] | None = None,
) -> Execution:
    """Write the merged checkpoint to the folder `out`, or complete the output of an interrupted run of the same plan.

    The plan is ready: its downloads, alignments and edits are made. memory: bytes that the engine may hold. compile:
    "auto" compiles elementwise functions to machine code if the merge is large enough to repay it; the bytes are the
    same. gpu: the device for the arithmetic instead of the processor; docs/gpu.md says which bytes that changes.
    progress is called with each number of bytes newly written. OUT appears only when it is complete.

    Raises PlanError before anything is written if the plan is not ready, or if `out`, the memory or the disk do not
    allow it; FormatError if an input or the result holds NaN or infinity (`nan="error"`).
    """
    folder = out.resolve()
    if _already_there(plan, folder, overwrite=overwrite, resume=resume, nan=nan):
        return Execution(already_there=True)
    if resume and finish(plan.digest, folder):
        return Execution(resumed_bytes=plan.bytes_written)
    budget = memory or default_memory()
    count = _check(plan, folder, budget, threads, gpu)
    keep_freed_memory()
    allow_many_files()
    with Output(plan.digest, plan.shards, folder, resume) as output, _kernels(plan, compile, count, gpu) as kernels:
        names = names_of(plan)
        run = Worker(
            plan,
            output,
            share=Budget(plan).share(budget, count),
            nan=nan,
            progress=progress or (lambda _: None),
            kernels=kernels,
            names=tuple(names[label] for label in plan.source_labels),
            gpu=gpu,
            device_share=gpu.room() // count if gpu else 0,
        )
        resumed = run.take_over()
        try:
            with _explain_full_gpu(), thread_pool(count, run.stop) as executor:
                _carry_out(run, executor)
        finally:
            output.flush()
        output.publish(documents(plan, output.done))
    lines = (*_findings(plan, output), *sorted(kernels.problems))
    return Execution(False, resumed, lines)


def _findings(plan: Plan, output: Output) -> Iterator[str]:
    """The warnings about a merge that was completed."""
    for where in sorted({where for receipt in output.done.values() for where in receipt.nonfinite}):
        yield f"{where} holds NaN or infinity"
    for label in plan.unlisted:
        yield f"{label}: offline, so only its files in the cache were used"


def _kernels(plan: Plan, compile: Mode, threads: int, gpu: Accelerator | None) -> Kernels | GpuKernels:
    numels = [job.spec.numel for job in plan.tensors if not job.copied]
    if gpu is not None:
        return GpuKernels(compile, sum(numels), gpu.device)
    return Kernels(compile, sum(numel // BLOCK for numel in numels), BLOCK, threads)


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
    rebuild = overwrite and not resume
    return already_there(plan.digest, plan.shards, inputs, folder, overwrite=overwrite, rebuild=rebuild, nan=nan)


def _check(plan: Plan, folder: Path, budget: int, threads: int | None, gpu: Accelerator | None) -> int:
    """The number of threads. Raises PlanError if the plan is not ready, or memory, disk or inputs forbid it."""
    if plan.pending or plan.unedited or plan.absent:
        raise PlanError(
            "the recipe asks for downloads, alignments or edits before its merge; call `mergekit_lfm.merge`, which "
            "makes them, or `prepare` the plan first"
        )
    count = workers(plan, budget, threads, gpu)
    check_copies(plan)
    check_disk(plan, folder)
    return count


def _carry_out(run: Worker, executor: Executor) -> None:
    """Run first all tasks that need no barrier, heavy ones first, then in file order; then those in several passes."""
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
            jobs[0].needs_sums and run.budget.resident(group) > (run.device_share if run.gpu else run.share)
        ):
            shared.append(jobs)
        elif jobs[0].needs_sums:
            alone.append(Work(jobs[0], missing[jobs[0].name], solve=True))
        else:
            coefficients = (
                None if jobs[0].copied else run_solve(METHODS[jobs[0].method].solve(plan.unit(jobs)), _no_sums)
            )
            segments = missing[jobs[0].name]
            parts = [segments] if run.budget.by_one_worker(jobs[0]) else [(segment,) for segment in segments]
            alone += [Work(jobs[0], part, coefficients) for part in parts]
    heavy = plan.bytes_written // 16
    alone.sort(key=lambda work: -work.job.nbytes if work.job.nbytes > heavy else 0)
    for _ in executor(run.do, alone):
        pass
    for jobs in shared:
        _in_passes(run, executor, jobs)


def _linear_work(run: Worker, group: LinearGroup) -> LinearWork:
    jobs = [run.plan.tensors[i] for i in group.jobs]
    return LinearWork(group, {job.name: run.missing(job) for job in jobs})


def _in_passes(run: Worker, executor: Executor, jobs: Sequence[Job]) -> None:
    """Solve a group that does not fit a worker's share: one pass over its inputs for each reduction, one to apply."""
    tasks = [(job, segment) for job in jobs for segment in range(job.segments)]

    def over(request: Reduction) -> Any:
        parts = executor(lambda i: (i, run.reduce(tasks[i][0], request, tasks[i][1])), range(len(tasks)))
        return add_in_order(request, parts)

    method = METHODS[jobs[0].method]
    coefficients = run_solve(method.solve(run.plan.unit(jobs)), over)
    works = [Work(job, (segment,), coefficients) for job in jobs for segment in run.missing(job)]
    for _ in executor(run.do, works):
        pass


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
