"""Compute tensors of an output again from its inputs, and compare them with its lock. Nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Literal

import xxhash

from mergekit_lfm.engine.run import Run
from mergekit_lfm.engine.shares import Share
from mergekit_lfm.engine.threads import thread_pool
from mergekit_lfm.engine.worker import Options, Worker
from mergekit_lfm.machine.accelerators import Accelerator
from mergekit_lfm.machine.progress import Progress
from mergekit_lfm.output.journal import Receipt
from mergekit_lfm.output.lock import Lock
from mergekit_lfm.plan.budget import Budget, workers
from mergekit_lfm.plan.plan import Plan


class Receipts:
    """The receipts of some segments, those of all others being as in a lock."""

    def __init__(self, plan: Plan, lock: Lock, names: Sequence[str]) -> None:
        self.done = {
            (name, segment): Receipt(name, segment, digest)
            for job in plan.tensors
            if job.name not in names
            for name in job.names
            for segment, digest in enumerate(lock.tensors[name].digests)
        }

    def record(self, receipt: Receipt, nbytes: int) -> None:  # noqa: ARG002
        """Keep a receipt."""
        self.done[receipt.tensor, receipt.segment] = receipt


def recompute(
    plan: Plan,
    lock: Lock,
    names: Sequence[str],
    *,
    memory: int,
    threads: int | None,
    accelerator: Accelerator,
    progress: Progress,
) -> list[str]:
    """The names, among these, of the tensors whose bytes are not those that the lock has digests of.

    The plan is ready, and that of the lock. The options are those of `execute`.
    """
    count = workers(plan, memory, threads, accelerator)
    options = Options.of(accelerator, Budget(plan).left(memory), count, "warn", "auto")
    receipts, chosen = Receipts(plan, lock, names), [job for job in plan.tensors if job.name in names]
    advancing = progress.by_bytes(sum(job.nbytes for job in chosen), "computing again")
    with advancing as advance, Worker(plan, None, options) as worker, thread_pool(worker, count) as executor:
        Run(plan, options, receipts, advance, Share(plan)).carry_out(executor)
    return [
        job.name
        for job in chosen
        if tuple(receipts.done[job.name, segment].xxh3 for segment in range(job.segments))
        != lock.tensors[job.name].digests
    ]


def choose(plan: Plan, sample: int | Literal["all"]) -> list[str]:
    """The names of so many tensors of a plan, always the same: by turns one of each method."""
    if sample == "all":
        return [job.name for job in plan.tensors]
    by_method: dict[str, list[str]] = {}
    for name, method in sorted((job.name, job.method) for job in plan.tensors):
        by_method.setdefault(method, []).append(name)
    mixed = [sorted(names, key=lambda name: xxhash.xxh3_64_intdigest(name.encode())) for names in by_method.values()]
    turns = zip_longest(*mixed)
    return [name for turn in turns for name in turn if name is not None][:sample]
