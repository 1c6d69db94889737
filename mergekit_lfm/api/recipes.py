"""`plan_recipe` and `run_recipe`: any recipe, whether a merge makes its output or a job; one stage, or several."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from mergekit_lfm.api.jobs import Job, find_job
from mergekit_lfm.api.merge import merge, run_planned, run_stages
from mergekit_lfm.api.merge_plans import RecipeLike, need_output, output_of, plan_merge, plan_stage
from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.api.planned import Planned, PlannedJob, PlannedMerge, plan_job
from mergekit_lfm.api.stages import in_stage, plan_stages
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import SILENCE
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.source import Source, source_of

# The options of the work on a stage, and their defaults, which are those of `merge`.
WORK: Mapping[str, Any] = {
    "memory": None,
    "threads": None,
    "nan": "error",
    "resume": True,
    "trust_times": False,
    "compile": "auto",
    "engine": "threads",
    "ray_address": None,
    "part": None,
    "stream_inputs": False,
    "progress": SILENCE,
}
PLANNING = ("max_shard_size", "seed", "heads", "device", "card", "allow_unknown")
OF_MERGES = ("push_to", "private", "verify_push", "on_merged")  # which a job that makes the output has no use for


def plan_recipe(recipe: RecipeLike, out: str | PathLike[str] | None = None, **options: Any) -> Outcome[Planned]:
    """Plan a recipe of any kind, a merge or a job, with all stages before it; nothing is written.

    The recipe and the options are those of `plan_merge`; a job takes those that are about its work. Raises as that
    does.
    """
    started = time.monotonic()
    source = None if isinstance(recipe, Recipe) else source_of(recipe)
    job = None if source is None else _job_of(source)
    if source is None or job is None:
        merged = plan_merge(recipe, out, **options)
        return Outcome[Planned](merged.path, merged.result, merged.digest, seconds=merged.seconds)
    _refuse_unknown(options, (*PLANNING, *OF_MERGES))
    planned = _plan_last(source, job, out, **options)
    return Outcome[Planned](planned.out, planned, warnings=planned.plan.notices, seconds=time.monotonic() - started)


def _job_of(source: Source) -> Job | None:
    """The job that makes the output; None for a merge."""
    if source.stages:
        return find_job(source.stages[-1].data, source.stages[-1].label)
    return find_job(source.documents[0], source.label)


def _plan_last(
    source: Source, job: Job, out: str | PathLike[str] | None, *, allow_unknown: bool = False, **options: Any
) -> PlannedJob:
    """The plan of the job that makes the output."""
    how = {name: options[name] for name in PLANNING if name in options}
    if not source.stages:
        (alone,) = source.documents
        assert isinstance(alone, Mapping)
        data = {key: value for key, value in alone.items() if key != "name"}
        recipe = job.parse(data, source.where, source.label, allow_unknown=allow_unknown)
        return plan_job(job, recipe, need_output(out or recipe.output or _default(source, job, data)), how)
    last = source.stages[-1]
    place = need_output(out or output_of(last) or _default(source, job, last.data))
    stages, parsed = plan_stages(source.stages, source.where, place, plan_stage, how, allow_unknown=allow_unknown)
    with in_stage(last):
        planned = plan_stage(last, parsed, place, how)
    assert isinstance(planned, PlannedJob)
    return replace(planned, stages=stages)


def _default(source: Source, job: Job, data: Mapping[str, Any]) -> Path | None:
    """The output by the name of the recipe's file; None without one. data: of the job."""
    place = source.default_output
    return None if place is None else place.with_name(f"{place.name}{job.suffix(data)}")


def run_recipe(recipe: RecipeLike | Planned, out: str | PathLike[str] | None = None, **options: Any) -> Outcome[Any]:
    """Carry out a recipe of any kind, or the result of `plan_recipe`: the stages in order that are not there yet.

    The options are those of `merge`; a job takes those that are about its work. The outcome is that of the stage that
    makes the output: of `merge`, `merge_adapters` or `extract_lora`. Raises as they do.
    """
    planned = recipe
    if not isinstance(planned, PlannedMerge | PlannedJob):
        source = None if isinstance(planned, Recipe) else source_of(planned)
        if source is None or _job_of(source) is None:
            return merge(planned, out, **options)
        planned = plan_recipe(planned, out, **{name: options[name] for name in PLANNING if name in options}).result
    if isinstance(planned, PlannedMerge):
        return merge(planned, **options)
    _refuse_unknown(options, (*PLANNING, *OF_MERGES, *WORK, "overwrite", "drop_stages"))
    _refuse_push(options)
    stages, run = planned.stages, {name: options.get(name, default) for name, default in WORK.items()}
    overwrite = bool(options.get("overwrite"))
    if stages is None:
        return run_planned(planned, run, overwrite=overwrite)
    earlier, last = run_stages(planned, run, overwrite=overwrite)
    outcome = run_planned(last, run, overwrite=overwrite)
    if options.get("drop_stages"):
        stages.drop()
    return replace(outcome, warnings=(*stages.findings(earlier), *outcome.warnings))


def _refuse_unknown(options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise TypeError for arguments that no recipe has."""
    if unknown := options.keys() - {*known}:
        raise TypeError(f"unexpected arguments: {', '.join(sorted(unknown))}")


def _refuse_push(options: Mapping[str, Any]) -> None:
    """Raise PlanError if the result of a job is to be pushed, or to be made in parts."""
    if options.get("part"):
        cure = "--partition 1/1 does all of it in one run"
        raise PlanError("a job is not shared by several runs; {cure}", cure=cure)
    if options.get("push_to"):
        raise PlanError(f"push_to: found {options['push_to']!r}, but what a job makes is not pushed; leave it out")
