"""Where a merge goes at the end: a repository on the Hub, or a place in a bucket, which OUT may be, too."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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
from mergekit_lfm.machine.resources import cache_folder, default_memory
from mergekit_lfm.recipe.form import Push
from mergekit_lfm.store.buckets import BucketName, bucket_name

if TYPE_CHECKING:
    from mergekit_lfm.output.outgoing import Pushed


def place_output(out: str | PathLike[str] | None, goal: Push | None, *, private: bool, stages: bool) -> Push | None:
    """The goal of a merge whose output is in a bucket; None for any other.

    goal: where else the result is to be pushed. Raises PlanError if there is such a place, or the recipe has stages.
    """
    name = bucket_name(str(out))
    if name is None:
        return None
    reason = f"the result is also to be pushed to {goal.repo}" if goal else None
    reason = "the recipe has stages, whose results stay beside OUT" if stages else reason
    reason = "--private is about a repository on the Hub" if private else reason
    if reason is not None:
        cure = f"give a folder of this machine as OUT, and --push-to {name}" if not private else "leave it out"
        raise PlanError("the output {place} is in a bucket, and {reason}; {cure}", place=name, reason=reason, cure=cure)
    return Push(repo=str(name))


def staging_folder(name: str, plan: str) -> Path:
    """The folder in the cache where the output of a plan is made that goes into a bucket."""
    place = bucket_name(name)
    assert place is not None
    return cache_folder("outgoing") / xxhash.xxh3_64_hexdigest(name.encode()) / plan[:16] / place.last


@contextmanager
def staging(planned: PlannedMerge) -> Iterator[None]:
    """Keep other runs out of the folder of the cache where the output is made. Raises PlanError if one is there."""
    if not planned.staged:
        yield
        return
    from mergekit_lfm.store.locks import lock_folder

    folder = planned.out.parents[1]
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        try:
            yield
        finally:
            with suppress(OSError):  # the merged model is in it
                folder.rmdir()


def check_goal(planned: PlannedMerge, run: Mapping[str, Any], *, overwrite: bool) -> None:
    """Raise PlanError if a push would fail, before the work. overwrite: a place in a bucket may hold another model.

    run: options of `merge` for the work. A place in a bucket is marked, once nothing forbids the work.
    """
    goal = planned.goal
    if goal is None:
        return
    if (bucket := bucket_name(goal.repo)) is not None:
        from mergekit_lfm.output.lock import lock_of
        from mergekit_lfm.output.push_bucket import check_place
        from mergekit_lfm.plan.budget import Budget, check_disk

        _refuse_inputs(bucket, planned)
        made = lock_of(planned.out).get("plan")
        if made != planned.plan.digest and run["engine"] == "threads":
            Budget(planned.plan).peak(as_bytes(run["memory"]) or default_memory(), run["threads"] or 1)
            check_disk(planned.plan, planned.out)
        check_place(bucket, planned.plan.digest, made, overwrite=overwrite)
        return
    from mergekit_lfm.output.push import check_repository

    check_repository(goal.repo, private=goal.private)


def _refuse_inputs(bucket: BucketName, planned: PlannedMerge) -> None:
    """Raise PlanError if the place, or a part of it, is an input, which a push would change."""
    plans = [*(planned.stages.plans if planned.stages else ()), planned]
    models = [model for each in plans if isinstance(each, PlannedMerge) for model in each.plan.recipe.all_models]
    sources = {source for model in models for source in (model.source, *(each.source for each in model.adapters))}
    for source in sources:
        if isinstance(source, BucketName) and (source.scheme, source.bucket) == (bucket.scheme, bucket.bucket):
            one, other = f"{source.path}/", f"{bucket.path}/"
            if one.startswith(other) or other.startswith(one):
                sentence = "the output {place} and the input {path} lie in one another; {cure}"
                raise PlanError(sentence, place=bucket, path=source, cure="choose another place for the output")


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
    from mergekit_lfm.output.push_bucket import compare_copy, is_whole, look_at
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
    if run["verify_push"]:
        compare_copy(snapshot, [*place.named, LOCK], cache_folder("outgoing"))
    pushed = Pushed(str(name), snapshot.commit, (), (), 0, False, (), run["verify_push"])
    return Outcome(planned.out, Merged(plan, pushed=pushed), plan.digest, already_there=True)


def push_merged(
    outcome: Outcome[Merged], planned: PlannedMerge, run: Mapping[str, Any], mark: str, *, overwrite: bool
) -> Outcome[Merged]:
    """Push the merged checkpoint as `check_goal` allowed; the outcome with the push, and with its time.

    mark: the digest of the plan that it saw. A folder of the cache in which it was made is then removed. Without a goal
    it is the outcome itself.
    """
    goal, started = planned.goal, time.monotonic()
    if goal is None:
        return outcome
    pushed: Pushed
    how: dict[str, Any] = {"pull_back": run["verify_push"], "progress": run["progress"]}
    if (bucket := bucket_name(goal.repo)) is not None:
        from mergekit_lfm.output.push_bucket import push_into_bucket

        pushed = push_into_bucket(planned.out, bucket, mark=mark, overwrite=overwrite, **how)
    else:
        from mergekit_lfm.output.push import push

        pushed = push(planned.out, goal.repo, private=goal.private, **how)
    if planned.staged:
        from mergekit_lfm.store.places import remove

        remove(planned.out.parents[1])
    seconds = outcome.seconds + time.monotonic() - started
    return replace(outcome, result=replace(outcome.result, pushed=pushed), seconds=seconds)
