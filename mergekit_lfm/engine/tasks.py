"""The tasks of a merge, each done by one worker without waiting for another, and their results. All are picklable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_lfm.kernels.block import Coefficients
from mergekit_lfm.kernels.reductions import Reduction
from mergekit_lfm.output.journal import Receipt


@dataclass(frozen=True, slots=True)
class MergeTask:
    """Merge or copy segments of a job, an index into the plan's tensors.

    solve: find the coefficients first, from all of the job's inputs, which are read once.
    """

    job: int
    segments: tuple[int, ...]
    coefficients: Coefficients | None = None
    solve: bool = False


@dataclass(frozen=True, slots=True)
class BatchTask:
    """Merge or copy small tensors, indices into the plan's, each of them whole, with solves of their own."""

    jobs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MatrixTask:
    """Merge a group of matrices, an index into the plan's, and write segments of its jobs."""

    group: int
    segments: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ReduceTask:
    """Compute one segment's part of a reduction over jobs that are solved together. number: its place in the sum."""

    number: int
    job: int
    segment: int
    request: Reduction


@dataclass(frozen=True, slots=True)
class Part:
    """The result of a `ReduceTask`."""

    number: int
    value: Any


@dataclass(frozen=True, slots=True)
class Remark:
    """A finding about a worker that changes no byte, such as a kernel that could not be compiled."""

    text: str


Task = MergeTask | BatchTask | MatrixTask | ReduceTask
Result = Receipt | Part | Remark

# An unordered map over tasks: the results of all, in any order. Those of a task that is done again may come twice.
Executor = Callable[[Iterable[Task]], Iterator[Result]]
