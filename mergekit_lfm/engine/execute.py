"""Carry a plan out: tasks for workers, whose receipts go into the journal, within a budget of memory.

A tensor whose method needs no sums is merged segment by segment. One that needs sums and fits a worker's share of the
budget is read once, by one worker. A larger one, or a whole model, takes several passes that all workers share. The
bytes are the same in each case: sums run over constant blocks in a constant order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mergekit_lfm.engine.documents import Documents
from mergekit_lfm.engine.inputs import Comparison, keep_states
from mergekit_lfm.engine.run import Run
from mergekit_lfm.engine.shares import Share
from mergekit_lfm.engine.sites import Engine, Site, this_machine
from mergekit_lfm.engine.worker import Options, Worker, refuse_nonfinite
from mergekit_lfm.errors import PlanError, reason, several, shorten
from mergekit_lfm.kernels.compiled import Mode
from mergekit_lfm.machine.accelerators import HOST, Accelerator
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.machine.resources import default_memory, explain_thread_limit
from mergekit_lfm.machine.sizes import format_size
from mergekit_lfm.output.lock import LOCK
from mergekit_lfm.output.publish import finish
from mergekit_lfm.output.replace import Policy, already_there, is_complete
from mergekit_lfm.output.writer import Output, PublishedError
from mergekit_lfm.plan.budget import Budget, check_disk, workers
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.store.compare import are_equal, have_same_bytes
from mergekit_lfm.store.places import partial_of, place_of
from mergekit_lfm.store.sidecars import QUIET


@dataclass(frozen=True, slots=True)
class Execution:
    """The outcome of `execute`. resumed_bytes: written by an earlier, interrupted run. findings: one line each.

    waiting: True after a part of the work, if other parts are not done yet.
    """

    already_there: bool = False
    resumed_bytes: int = 0
    findings: tuple[str, ...] = ()
    waiting: bool = False


@explain_thread_limit()
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
    trust_times: bool = False,
    engine: Engine = this_machine,
    part: tuple[int, int] | None = None,
    progress: Progress = SILENCE,
    doing: str = "merging",
) -> Execution:
    """Write the merged checkpoint to the folder `out`, or complete the output of an interrupted run of the same plan.

    Does nothing if `out` holds the output of this plan on these inputs: by the digests of their bytes in its lock,
    which are compared if a file is in another state than when it was merged or last compared.

    The plan is ready: its downloads, alignments and edits are made. memory: bytes that the engine may hold. compile:
    "auto" compiles elementwise functions to machine code if the merge is large enough to repay it; the bytes are the
    same. accelerator: the device for the arithmetic, by default the processor; docs/gpu.md says which bytes it changes.
    trust_times: go by sizes and modification times of the inputs, not by inodes and times of any change. engine: where
    workers run; memory and threads are then of one machine there. part: (i, n) does the i-th of n parts, each a run of
    its own; the last to end makes OUT. doing: the word for the work in its progress. OUT appears when it is complete.

    Raises PlanError before anything is written if the plan is not ready, if `out` was made from other inputs, or if it,
    the memory or the disk do not allow the work; FormatError if a document of the output cannot be written, before
    anything is, if an input or the result holds NaN or infinity (`nan="error"`), or if an input was changed meanwhile.
    """
    folder, budget = place_of(out), memory or default_memory()
    comparison = Comparison(plan, budget, threads, progress, trust_times)
    where: dict[str, Any] = {"overwrite": overwrite, "resume": resume, "nan": nan, "shared": part is not None}
    if _already_there(comparison, folder, **where):
        return Execution(already_there=True)
    documents = Documents(plan, folder.name)
    documents.check()
    if resume and is_complete(plan.digest, folder):
        if finish(plan.shards, documents.files, folder, comparison.is_sound, shared=part is not None):
            return Execution(resumed_bytes=plan.bytes_written)
        if _already_there(comparison, folder, **where):  # an output that was put back
            return Execution(already_there=True)
    _refuse_unready(plan)
    with engine(plan) as site:
        count = _check(plan, folder, budget := memory or site.memory or budget, threads, accelerator, site.threads)
        options = Options.of(accelerator, Budget(plan).left(budget), count, nan, compile)
        share, how = (Share(plan), {}) if part is None else (Share(plan, *part), {"part": part[0]})
        files = partial(Output, plan.digest, plan.shards, plan.inputs, folder, resume, trust_times=trust_times, **how)
        try:
            with files() as output, progress.by_bytes(share.nbytes, doing) as advance:
                return _carry_out(Run(plan, options, output, advance, share), output, site, documents, progress)
        except PublishedError:
            return Execution(already_there=True)


def _carry_out(run: Run, output: Output, site: Site, documents: Documents, progress: Progress) -> Execution:
    """Write what is left of a share, and make OUT of it if all else is written."""
    plan, nan = run.plan, run.options.nan
    run.progress(resumed := _take_over(run, output))
    _work(run, output, site)
    if output.part is not None:
        if not output.join(_places(plan)):
            return Execution(False, resumed, (*output.notices, *sorted(run.remarks)), waiting=True)
        theirs = format_size(plan.bytes_written - run.share.nbytes)
        progress.notice(f"all parts are written; reading {theirs} of the others")
        last = replace(run, share=Share(plan), progress=lambda _: None)  # all that others have written is read again
        _drop_damaged(last, output, lambda job, segment: not run.share.has(job, segment))
        _work(last, output, site)
    _check_finite(output, nan)
    lock, digest = documents.lock(output.done)
    output.publish({**documents.files, LOCK: lock})
    keep_states(plan, digest)
    return Execution(False, resumed, (*_findings(plan, output), *sorted(run.remarks)))


def _work(run: Run, output: Output, site: Site) -> None:
    """Carry out what is left of a share."""
    with Worker(run.plan, output.partial, run.options) as worker:
        try:
            with _explain_full_gpu(), site.pool(worker, run.options.threads) as executor:
                run.carry_out(executor)
        finally:
            output.flush()


def _check_finite(output: Output, nan: Policy) -> None:
    """Raise FormatError if an earlier run, or one of another part, has accepted NaN, and this one does not."""
    for receipt in output.done.values():
        for where in receipt.nonfinite:
            refuse_nonfinite(where, nan)


def _places(plan: Plan) -> Iterator[tuple[str, int]]:
    """All tensors of the output and their segments."""
    return ((name, k) for job in plan.tensors for name in job.names for k in range(job.segments))


def _take_over(run: Run, output: Output) -> int:
    """The bytes of a share that an interrupted run has written, and that are as it has left them.

    Raises FormatError if it accepted NaN and this one does not.
    """
    mine = _drop_damaged(run, output, run.share.has)
    _check_finite(output, run.options.nan)
    return sum(run.jobs[name].segment_nbytes(segment) for name, segment in output.done if mine(name, segment))


def _drop_damaged(run: Run, output: Output, has: Callable[[int, int], bool]) -> Callable[[str, int], bool]:
    """Drop receipts of damaged segments; has: True for the job and segment of those to read, also by tensors' names."""
    numbers = {name: i for i, job in enumerate(run.plan.tensors) for name in job.names}

    def chosen(name: str, segment: int) -> bool:
        return has(numbers[name], segment)

    output.drop_damaged(lambda name, segment: run.jobs[name].segment_range(segment), run.options.threads, chosen)
    return chosen


def _findings(plan: Plan, output: Output) -> Iterator[str]:
    """The warnings about a merge that was completed."""
    yield from output.notices
    yield from plan.recipe.notices
    yield from plan.warnings
    for where in sorted({where for receipt in output.done.values() for where in receipt.nonfinite}):
        yield f"{where} holds NaN or infinity"
    yield from (f"merged although {text}" for text in plan.allowed)
    for (label, why), names in plan.left_groups.items():
        if why not in QUIET:
            yield f"{label}: {shorten(names)} {'was' if len(names) == 1 else 'were'} left behind: {why}"
    for name, label in plan.lent:
        yield f"{name} was taken from {label}, as {plan.labels[plan.template]} lacks it and names it"
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


def is_written(comparison: Comparison, folder: Path, *, overwrite: bool, resume: bool, nan: Policy) -> bool:
    """True if `execute` with these options has no tensor left to write. Raises PlanError if it must not write there.

    False, too, if only a plan that is ready can tell, as its inputs have to be read.
    """
    if _already_there(comparison, folder, overwrite=overwrite, resume=resume, nan=nan):
        return True
    return resume and is_complete(comparison.plan.digest, folder) and comparison.is_sound(partial_of(folder))


def _already_there(
    comparison: Comparison, folder: Path, *, overwrite: bool, resume: bool, nan: Policy, shared: bool = False
) -> bool:
    """Whether OUT is there. shared: one part of several does not make it again, as another may just have made it."""
    plan, rebuild = comparison.plan, (overwrite and not shared) or not resume
    there = already_there(plan.digest, plan.shards, plan.places, folder, overwrite=overwrite, rebuild=rebuild, nan=nan)
    return there and comparison.has_these_inputs(folder)


def _check(
    plan: Plan, folder: Path, budget: int, threads: int | None, accelerator: Accelerator, most: int | None
) -> int:
    """The number of threads, by default at most `most`. Raises PlanError if memory, disk or inputs forbid the work."""
    count = workers(plan, budget, threads, accelerator, most)
    check_copies(plan)
    check_disk(plan, folder)
    return count


def _refuse_unready(plan: Plan) -> None:
    if plan.pending or plan.unedited or plan.absent:
        raise PlanError(
            "the recipe asks for downloads, alignments or edits before its merge; call `mergekit_lfm.merge`, which "
            "makes them, or `prepare` the plan first"
        )


def check_copies(plan: Plan) -> None:
    """Raise PlanError if tensors differ that have to be equal. Compares them before anything is written."""
    problems = []
    for (i, one), (_, other) in (pair for job in plan.tensors for pair in job.match.twins):
        if not have_same_bytes(plan.models[i], one, plan.models[i], other):
            problems.append(
                f"{plan.labels[i]}: its config ties {one} and {other}, but they differ, so loaders disagree which to "
                f"use: save the model anew, or leave one out with `keep: {{{other}: drop}}`"
            )
    for job in plan.tensors:
        (i, one), *others = job.sources
        for j, other in others if job.copied and job.match.kind == "parameter" else ():
            if not are_equal(plan.models[i], one, plan.models[j], other):
                problems.append(
                    f"{job.spec} differs between {plan.labels[i]} and {plan.labels[j]}, and tensors that are not "
                    f"floating are copied, so they must be equal: choose one's with `keep: {{{job.name}: base}}`"
                )
    if problems:
        raise PlanError(several("tensors that have to be equal are not", problems))
