"""Memory, threads and disk: what a plan needs of each, and whether this machine has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.resources import allocated_bytes, default_threads, free_space
from mergekit_lfm.machine.sizes import format_size
from mergekit_lfm.plan.job import Job
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.store.places import partial_of
from mergekit_lfm.store.tensors import ITEMSIZE

if TYPE_CHECKING:
    from mergekit_lfm.machine.accelerators import Accelerator

WORKERS = 16  # threads that feed a GPU by default: more would share its memory, and so work on smaller chunks


@dataclass(frozen=True)
class Budget:
    """The memory that the work on a plan takes, in bytes: of the host, and of a GPU's free memory, `room`."""

    plan: Plan

    def scratch(self, job: Job) -> int:
        """Bytes that one worker holds to process the job block by block."""
        if job.copied:
            return min(job.block, job.spec.numel) * ITEMSIZE[job.dtype] + self.views(job)
        return self.working(job) + self.views(job)

    def working(self, job: Job) -> int:
        """The part of `scratch` that a GPU holds if there is one: all but the memory of views."""
        return min(job.block, job.spec.numel) * len(job.read) * (ITEMSIZE[job.compute] * 8 + 8) + job.sums_nbytes

    def views(self, job: Job) -> int:
        """Bytes that views take while any range of the job's inputs is read."""
        return sum(self.plan.sources[i].cost(name).scratch for i, name in job.read_at_all)

    @property
    def resident_views(self) -> int:
        """Bytes that views take as long as the merge runs."""
        return sum(source.resident for source in self.plan.sources)

    def resident(self, group: Sequence[int]) -> int:
        """Bytes that one worker holds to read a group once: inputs, scratch, and what order statistics may collect."""
        jobs = [self.plan.tensors[i] for i in group]
        inputs = sum(self.plan.sources[i][name].nbytes for job in jobs for i, name in job.read)
        return inputs * 5 // 4 + max(self.scratch(job) for job in jobs)

    def by_one_worker(self, job: Job) -> bool:
        """True if one worker should do all of the job, as a view makes the whole tensor for each that reads it."""
        return any(self.plan.sources[i].cost(name).at_once for i, name in job.read_at_all)

    def share(self, memory: int, threads: int) -> int:
        """Bytes that each of so many workers may hold."""
        return (memory - self.resident_views) // max(1, threads)

    def most_threads(self, memory: int, room: int | None = None) -> int:
        """The number of threads, at least one, for which `memory` bytes suffice, and `room` on a GPU."""
        most = (memory - self.resident_views) // max([1, *(nbytes for _, nbytes in self._demands())])
        on_gpu = most if room is None else room // max([1, *(nbytes for _, nbytes in self._demands_of_gpu())])
        return max(1, min(most, on_gpu))

    def peak(self, memory: int, threads: int) -> int:
        """An upper bound of the bytes that the engine holds, at most `memory`. Raises PlanError if it takes more."""
        plan, share = self.plan, self.share(memory, threads)
        if not plan.tensors:
            return 0
        name, largest = max(self._demands(), key=lambda demand: demand[1])
        if largest > share:
            fixed = self.resident_views
            views = f", less {fixed / 1e6:,.0f} MB for transforms and patches," if fixed else ""
            raise PlanError(
                f"{name} needs {largest / 1e6:,.0f} MB for one worker, a budget of {memory / 1e6:,.0f} MB{views} gives "
                f"each of {threads} {max(0, share) / 1e6:,.0f} MB: raise --memory, lower --threads"
            )
        kept = [self.resident(g) for g in plan.groups if plan.tensors[g[0]].needs_sums and self.resident(g) <= share]
        return min(memory, self.resident_views + threads * max([largest, *kept]))

    def check_room(self, room: int, threads: int) -> None:
        """Raise PlanError if a GPU's memory is too little: each of so many threads has its share of `room` bytes."""
        name, largest = max(self._demands_of_gpu(), key=lambda demand: demand[1], default=("", 0))
        if largest > room // threads:
            raise PlanError(
                f"{name} needs {format_size(largest)} of the GPU's memory for one worker; the free memory gives each "
                f"of {threads} {format_size(room // threads)}: lower --threads, or use --device cpu"
            )

    def _demands(self) -> Iterator[tuple[str, int]]:
        """The bytes that one worker holds at least for each tensor or group of layers, with its name."""
        yield from ((job.name, self.scratch(job)) for job in self.plan.tensors)
        for group in self.plan.linears:
            jobs = [self.plan.tensors[i] for i in group.jobs]
            yield jobs[0].name, group.nbytes + max(self.views(job) for job in jobs)

    def _demands_of_gpu(self) -> Iterator[tuple[str, int]]:
        yield from ((job.name, self.working(job)) for job in self.plan.tensors if not job.copied)
        yield from ((self.plan.tensors[group.jobs[0]].name, group.nbytes) for group in self.plan.linears)


def workers(plan: Plan, memory: int, threads: int | None, gpu: Accelerator | None) -> int:
    """The number of threads for so many bytes. Raises PlanError if these, or a GPU's memory, are too few for them."""
    budget, room = Budget(plan), None if gpu is None else gpu.room()
    most = default_threads() if room is None else min(WORKERS, default_threads())
    count = threads or min(most, budget.most_threads(memory, room))
    budget.peak(memory, count)
    if room is not None:
        budget.check_room(room, count)
    return count


def missing_disk(plan: Plan, out: Path) -> int:
    """Bytes of free disk that the output lacks, less what an earlier run has reserved; at most 0 if it fits."""
    return sum(shard.nbytes for shard in plan.shards) - allocated_bytes(partial_of(out)) - free_space(out)


def check_disk(plan: Plan, out: Path) -> None:
    """Raise PlanError if the disk has no space for the output."""
    if missing_disk(plan, out) > 0:
        free = free_space(out)
        needed = missing_disk(plan, out) + free
        raise PlanError(f"{out} needs {needed / 1e9:,.3g} GB more, the disk has {free / 1e9:,.3g} GB free; make space")
