"""Where a merge goes at the end: a repository on the Hub, or a place in a bucket, which OUT may be, too."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import xxhash

from mergekit_lfm.api.arguments import as_bytes
from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.api.planned import Merged, PlannedMerge
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import Progress
from mergekit_lfm.machine.resources import cache_folder, default_memory
from mergekit_lfm.recipe.form import Push
from mergekit_lfm.store.buckets import BucketName, bucket_name

if TYPE_CHECKING:
    from mergekit_lfm.output.outgoing import Pushed


def place_output(out: str | PathLike[str] | None, goal: Push | None) -> tuple[Path, Push] | None:
    """The folder of this machine and the goal of a merge whose output is in a bucket; None for any other.

    goal: where else the result is to be pushed. Raises PlanError if there is such a place.
    """
    name = bucket_name(str(out))
    if name is None:
        return None
    if goal is not None:
        sentence = "the output {place} is in a bucket, and the result is also to be pushed to {found}; {cure}"
        raise PlanError(sentence, place=name, found=goal.repo, cure="give a folder of this machine as OUT")
    return staging_folder(name), Push(repo=str(name))


def staging_folder(name: BucketName) -> Path:
    """The folder in the cache where an output is made that goes into a bucket."""
    return cache_folder("outgoing") / xxhash.xxh3_64_hexdigest(str(name).encode()) / name.last


def check_goal(planned: PlannedMerge, *, overwrite: bool) -> None:
    """Raise PlanError if a push would fail, before the work. overwrite: a place in a bucket may hold another model."""
    goal = planned.goal
    if goal is None:
        return
    if (bucket := bucket_name(goal.repo)) is not None:
        from mergekit_lfm.output.push_bucket import check_place

        check_place(bucket, planned.plan.digest, overwrite=overwrite)
        return
    from mergekit_lfm.output.push import check_repository

    check_repository(goal.repo, private=goal.private)


def find_in_place(planned: PlannedMerge, run: Mapping[str, Any], *, overwrite: bool) -> Outcome[Merged] | None:
    """The outcome of a merge whose output is in a bucket, if it is there already, made from the inputs as they are.

    run: options of `merge` for the work. Raises PlanError if it was made from other inputs.
    """
    name = bucket_name(planned.goal.repo) if planned.staged and planned.goal is not None else None
    if name is None or overwrite or not run["resume"]:
        return None
    from mergekit_lfm.engine.inputs import Comparison
    from mergekit_lfm.output.lock import LOCK
    from mergekit_lfm.output.outgoing import Pushed
    from mergekit_lfm.output.push_bucket import is_whole, look_at
    from mergekit_lfm.store.buckets.snapshots import find_in_bucket

    place, plan = look_at(name), planned.plan
    if place.lock.get("plan") != plan.digest or not is_whole(place, {each.name: each.nbytes for each in plan.shards}):
        return None
    snapshot, memory = find_in_bucket(name), as_bytes(run["memory"]) or default_memory()
    with TemporaryDirectory(prefix="mergekit_lfm-lock-") as folder:
        snapshot.copy_to(Path(folder), [LOCK])
        compared = Comparison(plan, memory, run["threads"], run["progress"], run["trust_times"])
        if not compared.has_these_inputs(Path(folder)):
            return None
    pushed = Pushed(str(name), snapshot.commit, (), (), 0, False, ())
    return Outcome(planned.out, Merged(plan, pushed=pushed), plan.digest, already_there=True)


def push_merged(
    outcome: Outcome[Merged], planned: PlannedMerge, verify: bool, progress: Progress, started: float
) -> Outcome[Merged]:
    """Push the merged checkpoint as `check_goal` allowed; the outcome with the push and the seconds since `started`.

    A folder of the cache in which it was made is then removed. Without a goal it is the outcome itself.
    """
    goal = planned.goal
    if goal is None:
        return outcome
    pushed: Pushed
    if (bucket := bucket_name(goal.repo)) is not None:
        from mergekit_lfm.output.push_bucket import push_into_bucket

        pushed = push_into_bucket(planned.out, bucket, overwrite=True, pull_back=verify, progress=progress)
    else:
        from mergekit_lfm.output.push import push

        pushed = push(planned.out, goal.repo, private=goal.private, pull_back=verify, progress=progress)
    if planned.staged:
        from mergekit_lfm.store.places import remove

        remove(planned.out.parent)
    return replace(outcome, result=replace(outcome.result, pushed=pushed), seconds=time.monotonic() - started)
