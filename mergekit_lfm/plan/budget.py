"""Memory, threads and disk of a plan: what it needs, and whether that is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.resources import allocated_bytes, default_threads, free_space
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.store.places import partial_of

if TYPE_CHECKING:
    from mergekit_lfm.machine.accelerators import Accelerator

WORKERS = 16  # threads that feed a GPU by default: more would share its memory, and so work on smaller chunks


def workers(plan: Plan, memory: int, threads: int | None, gpu: Accelerator | None) -> int:
    """How many threads a merge has in so many bytes. PlanError where these, or a GPU's memory, are too few for them."""
    room = None if gpu is None else gpu.room()
    most = default_threads() if room is None else min(WORKERS, default_threads())
    count = threads or min(most, plan.most_threads(memory, room))
    plan.peak_memory(memory, count)
    if room is not None:
        plan.check_room(room, count)
    return count


def check_disk(plan: Plan, out: Path) -> None:
    """PlanError where the disk has no room for the output, less what an earlier run has reserved."""
    needed = sum(shard.nbytes for shard in plan.shards) - allocated_bytes(partial_of(out))
    if needed > free_space(out):
        free = free_space(out) / 1e9
        raise PlanError(f"{out} needs {needed / 1e9:,.3g} GB more, the disk has {free:,.3g} GB free; make room")
