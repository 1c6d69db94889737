"""Work that is split before it begins: each of several runs does its part of one plan, and no run speaks to another.

A part is a run of neighbouring bytes of the output, so that it reads and writes files in their order, and most shards
are written by one part alone. Tensors that are solved together stay together.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from mergekit_lfm.plan.plan import Plan


@dataclass(frozen=True)
class Share:
    """Part `number`, from 1, of the `count` parts of a plan's work."""

    plan: Plan
    number: int = 1
    count: int = 1

    def has(self, job: int, segment: int) -> bool:
        """True if a segment of a job, an index into the plan's tensors, belongs to this part."""
        if self.count == 1:
            return True
        first = self._first[job]
        whole = self.plan.tensors[job].needs_sums or job in self._of_matrices
        place = first if whole else first + self.plan.tensors[job].segment_range(segment)[0]
        return bisect_right(self._ends, place) == self.number - 1

    @property
    def nbytes(self) -> int:
        """The bytes of the output that this part writes."""
        jobs = enumerate(self.plan.tensors)
        each = ((job, job.segment_nbytes(k)) for i, job in jobs for k in range(job.segments) if self.has(i, k))
        return sum(len(job.names) * nbytes for job, nbytes in each)

    @cached_property
    def _first(self) -> list[int]:
        """The place of each job in the bytes of all; of matrices that are merged together, that of the first."""
        ends = accumulate(job.nbytes for job in self.plan.tensors)
        places = [end - job.nbytes for end, job in zip(ends, self.plan.tensors, strict=True)]
        for group in self.plan.matrices:
            for job in group.jobs:
                places[job] = places[min(group.jobs)]
        return places

    @cached_property
    def _of_matrices(self) -> frozenset[int]:
        return frozenset(job for group in self.plan.matrices for job in group.jobs)

    @cached_property
    def _ends(self) -> list[int]:
        """The place at which each part but the last ends."""
        total = sum(job.nbytes for job in self.plan.tensors)
        return [total * number // self.count for number in range(1, self.count)]
