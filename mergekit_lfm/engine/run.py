"""The work on a plan: tasks for workers in the order that its sums need, and what becomes of the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from mergekit_lfm.engine.batches import split_batches
from mergekit_lfm.engine.blocks import add_in_order, run_solve
from mergekit_lfm.engine.shares import Share
from mergekit_lfm.engine.tasks import BatchTask, Executor, MatrixTask, MergeTask, Part, ReduceTask, Remark, Task
from mergekit_lfm.engine.worker import Options
from mergekit_lfm.kernels.reductions import Reduction
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.output.journal import Receipt
from mergekit_lfm.plan.budget import Budget
from mergekit_lfm.plan.job import Job
from mergekit_lfm.plan.plan import Plan

HEAVY = 64  # a tensor with more than this part of the output is begun early, so that it is not in work alone at the end


class Record(Protocol):
    """Keeps receipts. done: those of the segments that need no work."""

    @property
    def done(self) -> MutableMapping[tuple[str, int], Receipt]: ...
    def record(self, receipt: Receipt, nbytes: int, /) -> None: ...


@dataclass
class Run:
    """One execution: its tasks in order, and what becomes of their results. share: of the plan's work, it does."""

    plan: Plan
    options: Options
    output: Record
    progress: Callable[[int], None]
    share: Share
    remarks: set[str] = field(default_factory=set)

    def carry_out(self, executor: Executor) -> None:
        """Do first all tasks that need no barrier, heavy ones first, then in file order; then those in passes."""
        jobs, at_once = self.plan.tensors, not self.options.accelerator.by_chunk
        anew = not self.output.done and self.share.count == 1
        waiting = [group for group in self.plan.groups if anew or any(self._missing(i) for i in group)]
        shared, alone, small = list[tuple[int, ...]](), list[int](), list[int]()
        for group in waiting:
            if self._takes_passes(group):
                shared.append(group)
            else:
                (small if at_once and jobs[group[0]].small else alone).append(group[0])
        heavy = self.plan.bytes_written // HEAVY
        alone.sort(key=lambda i: -jobs[i].nbytes if jobs[i].nbytes > heavy else 0)
        tasks = [task for i in alone for task in self._tasks(i)]
        batches = split_batches(self.budget, small, self.options.share)
        self._do(executor, [*self._matrix_tasks(), *tasks, *map(BatchTask, batches)])
        for group in shared:
            self._solve(executor, group)

    def _missing(self, job: int) -> tuple[int, ...]:
        """The segments of a job that are of this share, and without a receipt."""
        names, done, has = self.plan.tensors[job].names, self.output.done, self.share.has
        segments = [segment for segment in range(self.plan.tensors[job].segments) if has(job, segment)]
        return tuple([segment for segment in segments if not all((name, segment) in done for name in names)])

    def _takes_passes(self, group: Sequence[int]) -> bool:
        """True if a group's inputs do not fit a worker's share, so that all workers read them, once for every sum."""
        needs_sums = self.plan.tensors[group[0]].needs_sums
        return len(group) > 1 or (needs_sums and self.budget.resident(group) > self.options.device_share)

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
        coefficients = None
        if not (job.copied or job.by_row):
            coefficients = run_solve(METHODS[job.method].solve(self.plan.unit([job])), _no_sums)
        parts = [missing] if self.budget.by_one_worker(job) else [(segment,) for segment in missing]
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
        return {name: job for job in self.plan.tensors for name in job.names}

    @cached_property
    def budget(self) -> Budget:
        """The memory that the work takes."""
        return Budget(self.plan)


def _no_sums(_: Reduction) -> Any:
    raise AssertionError("the plan says that this solve asks for no reduction")
