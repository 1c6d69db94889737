"""Whether an output was made from the inputs as they are now: by the digests in its lock, or by a note in the cache.

The note says that the inputs' files, in a certain state, have the digests in a certain lock. Without it the inputs are
read and compared. Inputs on the Hub are known by their commit, and edits of the result by the plan's digest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from mergekit_lfm.engine.digests import SegmentDigests, combine, is_verbatim
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import Progress
from mergekit_lfm.machine.resources import cache_folder, default_threads
from mergekit_lfm.output.lock import Lock, read_lock, verify
from mergekit_lfm.plan.budget import Budget
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.plan.roles import TensorRef
from mergekit_lfm.store.checkpoint import Checkpoint

SHOWN = 5  # tensors that a message names


@dataclass(frozen=True, slots=True)
class Reading:
    """A tensor that jobs read, and the digest of its segments in a lock. numel: of a segment, None for all of it."""

    source: TensorRef
    numel: int | None
    segments: int
    digest: str


@dataclass(frozen=True)
class Comparison:
    """Compares a plan's inputs with the locks of its outputs. memory, threads, progress: as of `execute`.

    trust_times: go by sizes and modification times of files, not by inodes and times of any change.
    """

    plan: Plan
    memory: int
    threads: int | None
    progress: Progress
    trust_times: bool = False

    def has_these_inputs(self, folder: Path) -> bool:
        """True if an output of the plan was made from the inputs as they are. Raises PlanError if it was not.

        False if that is not known, and models have to be aligned or edited before they can be compared.
        """
        lock = read_lock(folder)
        if self._knows(lock):
            return True
        if self.plan.pending:
            return False
        if changed := self.find_changes(lock):
            raise PlanError(
                f"{folder} was made from other inputs: {_several(self.plan, changed)} changed since; choose another "
                "output, or use --overwrite"
            )
        return True

    def is_sound(self, folder: Path) -> bool:
        """True if an output of the plan is as its lock says, and was made from the inputs as they are."""
        nbytes = sum(shard.nbytes for shard in self.plan.shards)
        with self.progress.by_bytes(nbytes, "verifying the unfinished output") as advance:
            if verify(folder, advance, alone=False):
                return False
        lock = read_lock(folder)
        return self._knows(lock) or not (self.plan.pending or self.find_changes(lock))

    def find_changes(self, lock: Lock) -> list[TensorRef]:
        """The tensors of the inputs whose bytes are not those that the lock has digests of; [] is noted in the cache.

        Reads all inputs but those from the Hub. The plan's models are aligned and edited.
        """
        readings = list(_readings(self.plan, lock))
        nbytes = sum(self.plan.sources[i][name].nbytes for i, name in (reading.source for reading in readings))
        most = min(default_threads(), Budget(self.plan).most_threads(self.memory, self.memory))
        pool = ThreadPoolExecutor(self.threads or most)
        with self.progress.by_bytes(nbytes, "comparing the inputs with the lock") as advance, pool:

            def differs(reading: Reading) -> bool:
                checkpoint, name = self.plan.sources[reading.source[0]], reading.source[1]
                digests = SegmentDigests(checkpoint, name, reading.numel)
                found = combine([digests.take(number) for number in range(reading.segments)])
                advance(checkpoint[name].nbytes)
                return found != reading.digest

            changed = list(pool.map(differs, readings))
        if not any(changed):
            keep_states(self.plan, lock.digest)
        return [reading.source for reading, different in zip(readings, changed, strict=True) if different]

    def _knows(self, lock: Lock) -> bool:
        """True if the inputs are in a state in which they had the digests in the lock."""
        return not any(map(_is_local, _stored(self.plan))) or _note(self.plan, lock.digest, self.trust_times).exists()


def _readings(plan: Plan, lock: Lock) -> Iterator[Reading]:
    """The tensors that a lock has digests of, each once."""
    seen, local = set[tuple[TensorRef, int | None]](), [_is_local(source) for source in plan.sources]
    for job in plan.tensors:
        locked, grams = lock.tensors[job.name], plan.grams.get(job.name, ())
        if is_verbatim(plan, job):
            digests = dict.fromkeys(job.sources, combine(locked.digests))
        else:
            digests = dict(zip((*job.inputs, *grams), locked.inputs, strict=True))
        digests |= {twin: digests[ref] for ref, twin in job.match.twins if ref in digests}
        for source, digest in digests.items():
            numel, segments = (None, 1) if source in grams else (job.segment_numel, job.segments)
            if (source, numel) not in seen and local[source[0]]:
                seen.add((source, numel))
                yield Reading(source, numel, segments, digest)


def _is_local(checkpoint: Checkpoint) -> bool:
    """True unless a commit on the Hub identifies all of it."""
    return any(file.snapshot is None for file in checkpoint.files)


def keep_states(plan: Plan, digest: str) -> None:
    """Note in the cache that the inputs, as they were when they were opened, are those of the lock with this digest."""
    with suppress(OSError):  # without the note they are read again
        for trust_times in (False, True):
            note = _note(plan, digest, trust_times)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()


def _note(plan: Plan, digest: str, trust_times: bool) -> Path:
    """The file in the cache whose name stands for the inputs' states and a lock."""
    states = [
        str(file.snapshot) if file.state is None or file.snapshot else file.state.as_data(trust_times=trust_times)
        for source in _stored(plan)
        for file in source.files
    ]
    return cache_folder("inputs") / xxhash.xxh3_128_hexdigest(json.dumps([digest, states]).encode())


def _stored(plan: Plan) -> tuple[Checkpoint, ...]:
    """The sources of a plan that a lock has digests of: all but the changes by edits of the result."""
    return (*plan.models, *(statistics.tensors for statistics in plan.statistics))


def _several(plan: Plan, changed: list[TensorRef]) -> str:
    """The names of tensors with their models; the first few of many."""
    names = [f"{name} of {plan.source_labels[source]}" for source, name in changed[:SHOWN]]
    return ", ".join(names) + (f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else "")
