"""Digests of the tensors that a merge reads, taken while it reads them.

A tensor is known by the xxh3-128 of each of its segments, as the job that reads it sees it: aligned, edited or
dequantised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import xxhash

from mergekit_lfm.output.journal import Receipt
from mergekit_lfm.plan.job import Job
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tensors import ITEMSIZE

READ_AT_ONCE = 1 << 20  # bytes: the second pass over them, for the digest, finds them in the processor's cache


class SegmentDigests:
    """The xxh3-128 of a tensor's segments, taken from the ranges that others read.

    Of each segment a first reading in order counts, whatever is read between and after; without one it is read here.
    segment: elements of one; None for the whole tensor.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, segment: int | None = None) -> None:
        self._checkpoint, self._name, spec = checkpoint, name, checkpoint[name]
        self._size, self._nbytes = ITEMSIZE[spec.dtype], spec.nbytes
        self._step = max(1, spec.nbytes if segment is None else segment * self._size)
        self._digests: dict[int, Any] = {}
        self._done: dict[int, int] = {}  # bytes of each segment in its digest

    def add(self, start: int, data: memoryview) -> None:
        """Take in bytes that were read from element `start` on."""
        at, end = start * self._size, start * self._size + len(data)
        while at < end:
            number, inside = divmod(at, self._step)
            stop = min(end, (number + 1) * self._step)
            if inside == self._done.get(number, 0):
                self._digests.setdefault(number, xxhash.xxh3_128()).update(data[at - end + len(data) :][: stop - at])
                self._done[number] = inside + stop - at
            at = stop

    def take(self, number: int) -> str:
        """The digest of a segment, in hex."""
        first = number * self._step
        last = min(self._nbytes, first + self._step)
        at = first + self._done.get(number, 0)
        buffer = memoryview(bytearray(min(READ_AT_ONCE, last - at)))
        while at < last:
            data = buffer[: last - at]
            self._checkpoint.read_into(self._name, at // self._size, data)
            self.add(at // self._size, data)
            at += len(data)
        return str(self._digests.get(number, xxhash.xxh3_128()).hexdigest())


def combine(digests: Sequence[str]) -> str:
    """The digest of a whole tensor: that of its only segment, or xxh3-128 of those of all, in hex, put together."""
    return digests[0] if len(digests) == 1 else xxhash.xxh3_128_hexdigest("".join(digests).encode())


def is_verbatim(plan: Plan, job: Job) -> bool:
    """True if a job copies bytes that all of its sources have, so that their digests are the output's."""
    same = all(plan.sources[i][name].dtype == job.dtype for i, name in job.sources)
    return job.copied and same and job.match.kind != "counter"


def input_digests(job: Job, receipts: Mapping[tuple[str, int], Receipt]) -> list[str]:
    """The digests of all that a job reads: its inputs, the base last, then Gram matrices; [] for verbatim copies."""
    segments = [receipts[job.name, segment].inputs for segment in range(job.segments)]
    return [combine([digest for digest in column if digest is not None]) for column in zip_longest(*segments)]
