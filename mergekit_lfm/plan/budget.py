"""Memory, threads and disk: what a plan needs of each, and whether this machine has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lfm.errors import PlanError
from mergekit_lfm.kernels.reductions import ROWS
from mergekit_lfm.kernels.selection import FEW
from mergekit_lfm.machine.resources import allocated_bytes, free_space
from mergekit_lfm.machine.sizes import format_size
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.plan.job import SMALL, Job
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.store.places import partial_of
from mergekit_lfm.store.tensors import ITEMSIZE
from mergekit_lfm.views.base import View

if TYPE_CHECKING:
    from mergekit_lfm.machine.accelerators import Accelerator

LEAST_PART = 1 << 12  # elements of a block to merge at a time where memory is short; fewer would take longer than calls
HISTOGRAMS = 3 * (1 << 16) * 8  # bytes: of an input's magnitudes by their first 16 bits, of a block and of all


@dataclass(frozen=True)
class Budget:
    """The memory that the work on a plan takes, in bytes: of the host, and of a device's, `room`.

    in_parts: False for a device that takes whole blocks.
    """

    plan: Plan
    in_parts: bool = True

    def scratch(self, job: Job) -> int:
        """Bytes that one worker holds to process the job block by block."""
        return self.device_scratch(job) + self.views(job)

    def device_scratch(self, job: Job) -> int:
        """The part of `scratch` that the device holds: all but the memory of views."""
        numel = min(job.block, job.spec.numel)
        return numel * ITEMSIZE[job.dtype] if job.copied else self._merging(job, numel)

    def least(self, job: Job) -> int:
        """Bytes without which one worker cannot process the job, with blocks merged in small parts."""
        return self._device_least(job) + self.views(job)

    def _device_least(self, job: Job) -> int:
        """The part of `least` that the device holds."""
        if job.copied or not self.in_parts:
            return self.device_scratch(job)
        parts = self._merging(job, min(job.spec.numel, _part_numel(job, LEAST_PART)))
        return max(parts, self._reducing(job) if job.needs_sums else 0)

    def part(self, job: Job, nbytes: int) -> int:
        """Elements of a block that one worker merges at a time to hold no more than so many bytes, if they suffice."""
        numel = job.block
        while numel > LEAST_PART and self._merging(job, min(numel, job.spec.numel)) > nbytes:
            numel = numel // 2
        return _part_numel(job, numel)

    def _merging(self, job: Job, numel: int) -> int:
        """Bytes to merge so many elements at once, and for sums by row or column and the weights from them."""
        blocks = numel * len(job.inputs) * self._wide(job)
        if not job.sums:
            return blocks
        sums = job.sums * numel // job.spec.numel if job.by_row else job.sums
        return blocks + 6 * 8 * sums  # float64; the weights that a solve makes of them are not smaller

    def _reducing(self, job: Job) -> int:
        """Bytes for sums over a block: the inputs as they are stored, and those that are worked on at once."""
        numel, n = min(job.block, job.spec.numel), len(job.inputs)
        if n <= ROWS or METHODS[job.method].joint:
            return self._merging(job, numel)
        stored = sum(ITEMSIZE[self.plan.sources[i][name].dtype] for i, name in job.inputs)
        counts = n * HISTOGRAMS if job.spec.numel > FEW else 0
        return numel * (stored + ROWS * self._wide(job)) + counts + self._merging(job, 0)

    def _wide(self, job: Job) -> int:
        """Bytes for each element of an input while it is worked on."""
        return ITEMSIZE[job.compute] * 8 + 8

    def views(self, job: Job) -> int:
        """Bytes that views take while any range of the job's inputs is read."""
        views = self._views
        return sum([views[i].cost(name).scratch for i, name in job.all_inputs if i in views])

    @cached_property
    def _views(self) -> dict[int, View]:
        """The sources that take memory while they are read."""
        return {i: source for i, source in enumerate(self.plan.sources) if isinstance(source, View)}

    @property
    def resident_views(self) -> int:
        """Bytes that views take as long as the merge runs."""
        return sum(source.resident for source in self.plan.sources)

    def resident(self, group: Sequence[int]) -> int:
        """Bytes that one worker holds to read a group once: inputs, scratch, and what order statistics may collect."""
        jobs = [self.plan.tensors[i] for i in group]
        inputs = sum(self.plan.sources[i][name].nbytes for job in jobs for i, name in job.inputs)
        return inputs * 5 // 4 + max(self.scratch(job) for job in jobs)

    def by_one_worker(self, job: Job) -> bool:
        """True if one worker should do all of the job, as a view makes the whole tensor for each that reads it."""
        return any(self.plan.sources[i].cost(name).at_once for i, name in job.all_inputs)

    def left(self, memory: int) -> int:
        """The part of `memory` that workers share: all but what views hold."""
        return memory - self.resident_views

    def share(self, memory: int, threads: int) -> int:
        """Bytes that each of so many workers may hold."""
        return self.left(memory) // max(1, threads)

    def most_threads(self, memory: int, room: int) -> int:
        """The number of threads, at least one, for which `memory` bytes suffice, and `room` on the device."""
        on_host = self.left(memory) // max(1, self._largest[1])
        on_device = room // max(1, self._largest_of_device[1])
        return max(1, min(on_host, on_device))

    def peak(self, memory: int, threads: int) -> int:
        """An upper bound of the bytes that the engine holds, at most `memory`. Raises PlanError if it takes more."""
        plan, share = self.plan, self.share(memory, threads)
        if not plan.tensors:
            return 0
        name, largest = self._largest
        if largest > share:
            fixed = self.resident_views
            taken = f"{fixed / 1e6:,.0f} MB for transforms, patches and models that are streamed"
            views = f", less {taken}," if fixed else ""
            raise PlanError(
                f"{name} needs {largest / 1e6:,.0f} MB for one worker, a budget of {memory / 1e6:,.0f} MB{views} gives "
                f"each of {threads} {max(0, share) / 1e6:,.0f} MB: raise --memory, lower --threads"
            )
        kept = [self.resident(group) for group in plan.groups if plan.tensors[group[0]].needs_sums]
        whole = min(share, max([*self._scratches, self._batch]))
        most = max([largest, whole, *(nbytes for nbytes in kept if nbytes <= share)])
        return min(memory, self.resident_views + threads * most)

    def check_room(self, room: int, threads: int) -> None:
        """Raise PlanError if the device's memory is too little: each of so many threads has its share of `room`."""
        name, largest = self._largest_of_device
        if largest > room // threads:
            raise PlanError(
                f"{name} needs {format_size(largest)} of the GPU's memory for one worker; the free memory gives each "
                f"of {threads} {format_size(room // threads)}: lower --threads, or use --device cpu"
            )

    @cached_property
    def _scratches(self) -> tuple[int, ...]:
        """Bytes that a worker holds for each job if its share has room for whole blocks."""
        return tuple(map(self.scratch, self.plan.tensors))

    @cached_property
    def _device_leasts(self) -> tuple[int, ...]:
        """Bytes of the device without which no worker can process each job."""
        return tuple(map(self._device_least, self.plan.tensors))

    @cached_property
    def _batch(self) -> int:
        """Bytes that a worker holds at most for small jobs that it does at once, if its share has room for as many."""
        scratches = zip(self.plan.tensors, self._scratches, strict=True)
        small = [(job.spec.numel, nbytes) for job, nbytes in scratches if job.small]
        most = max((nbytes / numel for numel, nbytes in small), default=0)
        return min(sum(nbytes for _, nbytes in small), int(SMALL * most))

    @cached_property
    def _largest(self) -> tuple[str, int]:
        """The tensor or group of matrices for which one worker needs most, and these bytes."""
        leasts = zip(self.plan.tensors, self._device_leasts, strict=True)
        demands = [(job.name, nbytes + self.views(job)) for job, nbytes in leasts]
        for group in self.plan.matrices:
            jobs = [self.plan.tensors[i] for i in group.jobs]
            demands.append((jobs[0].name, group.nbytes + max(self.views(job) for job in jobs)))
        return max(demands, key=itemgetter(1), default=("", 0))

    @cached_property
    def _largest_of_device(self) -> tuple[str, int]:
        """The same on the device."""
        leasts = zip(self.plan.tensors, self._device_leasts, strict=True)
        demands = [(job.name, nbytes) for job, nbytes in leasts if not job.copied]
        demands += [(self.plan.tensors[group.jobs[0]].name, group.nbytes) for group in self.plan.matrices]
        return max(demands, key=itemgetter(1), default=("", 0))


def _part_numel(job: Job, most: int) -> int:
    """Up to `most` elements of a block: whole rows, at least one; else an even number, as of random numbers."""
    step = job.row or 2
    return min(job.block, max(1, most // step) * step)


def workers(plan: Plan, memory: int, threads: int | None, accelerator: Accelerator, most: int | None = None) -> int:
    """The number of threads for so many bytes. Raises PlanError if these, or the device's memory, are too few.

    most: as many as there may be by default; None: as this machine has cores, or as feed its device.
    """
    budget = Budget(plan, in_parts=not accelerator.by_chunk)
    room = accelerator.room(budget.left(memory))
    count = threads or min(most or accelerator.threads, budget.most_threads(memory, room))
    budget.peak(memory, count)
    budget.check_room(room, count)
    return count


def missing_disk(plan: Plan, out: Path) -> int:
    """Bytes of free disk that the output lacks, less what an earlier run has reserved; at most 0 if it fits."""
    free = free_space(out)  # before the rest, which another part of the run may reserve meanwhile
    return sum(shard.nbytes for shard in plan.shards) - allocated_bytes(partial_of(out)) - free


def check_disk(plan: Plan, out: Path) -> None:
    """Raise PlanError if the disk has no space for the output."""
    if missing_disk(plan, out) > 0:
        free = free_space(out)
        needed = missing_disk(plan, out) + free
        raise PlanError(f"{out} needs {needed / 1e9:,.3g} GB more, the disk has {free / 1e9:,.3g} GB free; make space")
