"""`merge`: from a plan to the merged checkpoint, pushed if asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergekit_lfm.api.arguments import as_bytes
from mergekit_lfm.api.engines import (
    Name,
    check_engine,
    check_part,
    check_site,
    ending_streams,
    find_engine,
    stream_models,
)
from mergekit_lfm.api.goals import check_goal, find_in_place, push_merged, staging
from mergekit_lfm.api.merge_plans import RecipeLike, plan_merge, plan_stage
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.api.planned import Merged, Planned, PlannedJob, PlannedMerge
from mergekit_lfm.api.stages import check_stages, in_stage
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.recipe.stages import Stage

if TYPE_CHECKING:
    from mergekit_lfm.engine.execute import Execution
    from mergekit_lfm.plan.plan import Plan


def merge(
    recipe: RecipeLike | PlannedMerge,
    out: str | PathLike[str] | None = None,
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    max_shard_size: int | str | None = None,
    seed: int | None = None,
    heads: Literal["base", "drop"] | None = None,
    device: str | None = None,
    nan: Literal["error", "warn"] = "error",
    overwrite: bool = False,
    resume: bool = True,
    trust_times: bool = False,
    compile: Literal["auto", "always", "never"] = "auto",
    push_to: str | None = None,
    private: bool = False,
    verify_push: bool = False,
    card: bool = True,
    allow_unknown: bool = False,
    drop_stages: bool = False,
    engine: Name = "threads",
    ray_address: str | None = None,
    part: tuple[int, int] | None = None,
    stream_inputs: bool = False,
    progress: Progress = SILENCE,
    on_merged: Callable[[Outcome[Merged]], None] | None = None,
) -> Outcome[Merged]:
    """Merge checkpoints as a recipe says (a YAML file, its text or data, a `Recipe`, or the result of `plan_merge`).

    out: by default the recipe's `output`, else `merged/<name of the recipe file>`; at an address in a bucket the result
    is made in the cache and pushed there. memory and max_shard_size: bytes, or text such as "4GB". heads, and device
    ("cpu", "cuda", "cuda:1" or "auto"): in place of the recipe's. nan: "warn" notes NaN and infinity in the lock and as
    a warning, "error" refuses them. trust_times, compile: as of `execute`. push_to: where the result is pushed, on the
    Hub or in a bucket, in place of the recipe's `push`; private: a repository has to be; verify_push: download it again
    and compare it with its lock. card: False for no model card. allow_unknown: unknown keys are warnings. drop_stages:
    remove the results of the recipe's earlier stages once OUT is complete. engine: "ray" has the nodes of the cluster
    at ray_address do the work ("local": of one for this run); memory and threads are then of one node. part: (i, n)
    does the i-th of n parts; others do theirs wherever the same files are seen, and the last to end makes OUT.
    stream_inputs: read models elsewhere by ranges, without a copy. on_merged is called when OUT is there.

    Raises PlanError or FormatError (both ValueError) with everything that is wrong, before anything is written if it
    can be known then; ConnectionError if the Hub cannot be reached. Called again, it goes on.
    """
    started = time.monotonic()
    check_engine(engine, ray_address)
    if not isinstance(recipe, PlannedMerge):
        how: dict[str, Any] = {"max_shard_size": max_shard_size, "seed": seed, "heads": heads, "device": device}
        how |= {"card": card, "push_to": push_to, "private": private, "allow_unknown": allow_unknown}
        recipe = plan_merge(recipe, out, **how).result
    run: dict[str, Any] = {"memory": memory, "threads": threads, "nan": nan, "resume": resume, "part": part}
    run |= {"trust_times": trust_times, "compile": compile, "engine": engine, "ray_address": ray_address}
    run |= {"stream_inputs": stream_inputs, "progress": progress}
    check_part(part, recipe, resume=resume, engine=engine)
    check_site(ray_address, recipe)
    goal = {"verify_push": verify_push, "on_merged": on_merged}
    with staging(recipe):
        return _merge_and_push(recipe, run, goal, started, overwrite=overwrite, drop_stages=drop_stages)


def _merge_and_push(
    planned: PlannedMerge,
    run: Mapping[str, Any],
    goal: Mapping[str, Any],
    started: float,
    *,
    overwrite: bool,
    drop_stages: bool,
) -> Outcome[Merged]:
    """The outcome of a merge, with its push. run, goal: options of `merge` for the work, and for what follows."""
    whole, mark = {**run, "verify_push": goal["verify_push"]}, planned.plan.digest
    if (there := find_in_place(planned, whole, overwrite=overwrite)) is not None:
        return there
    check_goal(planned, run, overwrite=overwrite)
    outcome, planned = _merge_planned(planned, run, started, overwrite=overwrite, drop_stages=drop_stages)
    if goal["on_merged"] is not None and not outcome.result.waiting:
        goal["on_merged"](outcome)
    if outcome.result.waiting or (run["part"] is not None and outcome.already_there):
        return outcome  # another part pushes
    return push_merged(outcome, planned, whole, mark, overwrite=overwrite)


def _merge_planned(
    planned: PlannedMerge, run: Mapping[str, Any], started: float, *, overwrite: bool, drop_stages: bool
) -> tuple[Outcome[Merged], PlannedMerge]:
    """The outcome of a merge and of its earlier stages, and its plan on their results."""
    stages = planned.stages
    earlier, planned = _run_earlier(planned, run, overwrite=overwrite)
    plan, done = _carry_out(planned, {**run, "overwrite": overwrite})
    merged = Merged(plan, done.resumed_bytes, stages=earlier, waiting=done.waiting)
    warnings = *(() if stages is None else stages.findings(earlier)), *warn_of(done.findings, depth=3)
    seconds = time.monotonic() - started
    if stages is not None and drop_stages:
        stages.drop()
    return Outcome(planned.out, merged, plan.digest, done.already_there, warnings, seconds), planned


def _carry_out(planned: PlannedMerge, options: Mapping[str, Any]) -> tuple[Plan, Execution]:
    """The plan, ready for the engine, and its execution. options: of `merge`, for `execute`."""
    from mergekit_lfm.engine.execute import execute

    plan, accelerator = planned.plan, planned.accelerator
    rest = {**options, "memory": as_bytes(options["memory"])}
    own = {"compile": rest.pop("compile"), "part": rest.pop("part")}
    own["engine"] = find_engine(rest.pop("engine"), rest.pop("ray_address"))
    if rest.pop("stream_inputs"):
        stream_models(plan, rest["memory"], rest["threads"])
    with ending_streams(plan):
        if plan.pending or plan.unedited or plan.absent:
            from mergekit_lfm.api.prepare import prepare

            where: dict[str, Any] = {"max_shard_size": planned.max_shard_size, "device": accelerator.name}
            plan = prepare(plan, planned.out, **where, **rest)
        return plan, execute(plan, planned.out, accelerator=accelerator, **own, **rest)


def _run_earlier(
    planned: PlannedMerge, run: Mapping[str, Any], *, overwrite: bool
) -> tuple[tuple[Outcome[Any], ...], PlannedMerge]:
    """The outcomes of the stages before a merge, and its plan on their results."""
    if planned.stages is None:
        return (), planned
    earlier, last = run_stages(planned, run, overwrite=overwrite)
    assert isinstance(last, PlannedMerge)
    return earlier, replace(last, goal=planned.goal, accelerator=planned.accelerator)


def run_stages(
    planned: Planned, run: Mapping[str, Any], *, overwrite: bool
) -> tuple[tuple[Outcome[Any], ...], Planned]:
    """The outcomes of all stages but the last, and the last one's plan on their results.

    planned: the last stage. run: options of `merge` for the work. An earlier result of a stage that has changed, or its
    inputs, is replaced, and so is a damaged one. overwrite: so may be the output.
    """
    stages = planned.stages
    assert stages is not None
    checked = {key: run[key] for key in ("threads", "resume", "nan")}
    check_stages(planned, memory=as_bytes(run["memory"]), overwrite=overwrite, **checked)
    done = list[Outcome[Any]]()
    for stage, each in zip(stages.stages, stages.plans, strict=True):
        run["progress"].notice(f"stage {stage.name}")
        each.out.parent.mkdir(parents=True, exist_ok=True)
        with in_stage(stage):
            now = plan_stage(stage, stages.recipe(stage), each.out, stages.how)
        changed = _has_changed(now, run)
        if changed and not (overwrite or stages.final):
            _refuse_older(planned.out, stage, now)
        with in_stage(stage):
            done.append(run_planned(now, run, overwrite=changed))
    with in_stage(stages.last):
        return tuple(done), plan_stage(stages.last, stages.recipe(stages.last), planned.out, stages.how)


def run_planned(planned: Planned, run: Mapping[str, Any], *, overwrite: bool) -> Outcome[Any]:
    """Carry out what is planned, without stages. run: options of `merge` for the work; a job takes its own."""
    if isinstance(planned, PlannedMerge):
        return merge(planned, overwrite=overwrite, **run)
    own = {name: run[name] for name in sorted(planned.job.run_options)}
    return planned.job.run(planned.plan, overwrite=overwrite, progress=run["progress"], **own)


def _refuse_older(out: Path, stage: Stage, now: Planned) -> None:
    """Raise PlanError if OUT is there, and the stage's result of another recipe or of other inputs.

    Before a job has run, the plan of the last stage does not show that.
    """
    from mergekit_lfm.output.lock import lock_of
    from mergekit_lfm.store.places import OVERWRITE, has_files

    if isinstance(now, PlannedJob):
        same = now.plan.request.is_of(now.out)
    else:
        same = lock_of(now.out).get("plan") == now.plan.digest
    if (out.is_file() or has_files(out)) and not same:
        sentence = "{place} exists and is from before the change of stage {name}; {cure}"
        raise PlanError(sentence, place=out, name=stage.name, cure=OVERWRITE)


def _has_changed(planned: Planned, run: Mapping[str, Any]) -> bool:
    """True if an earlier result of a stage is that of another plan or of other inputs, or damaged."""
    from mergekit_lfm.engine.execute import is_written
    from mergekit_lfm.engine.inputs import Comparison
    from mergekit_lfm.machine.resources import default_memory
    from mergekit_lfm.output.lock import lock_name
    from mergekit_lfm.store.places import place_of

    if not (planned.out.is_file() or lock_name(planned.out)):
        return False
    try:
        if isinstance(planned, PlannedJob):
            planned.plan.request.is_answered(planned.out, overwrite=False)
            return False
        memory = as_bytes(run["memory"]) or default_memory()
        comparison = Comparison(planned.plan, memory, run["threads"], run["progress"], run["trust_times"])
        is_written(comparison, place_of(planned.out), overwrite=False, resume=run["resume"], nan=run["nan"])
    except PlanError:
        return True
    return False
