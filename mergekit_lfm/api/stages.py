"""Recipes of several stages: planned all together before the first one runs, and carried out one after the other.

A stage that is still to run is planned on a stand-in for the results that it takes: their headers and small files, over
files without data. The results lie in OUT.stages, under the names of their stages, and each is made again only if its
stage has changed. A stage after a job is planned again on the result, whose ranks only data decide.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from mergekit_lfm.api.jobs import JobRecipe
from mergekit_lfm.api.planned import Planned, PlannedJob, PlannedMerge, Scratch, Stages, parse_stage, places_of
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.resources import default_memory
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.stages import Stage
from mergekit_lfm.store.places import beside

FILES = (".json", ".jsonl", ".npz", ".safetensors")  # how the names of results end that are files

PlanStage = Callable[[Stage, Recipe | JobRecipe, Path, Mapping[str, Any]], Planned]


def stages_folder(out: Path) -> Path:
    """The folder of what the stages of an output leave."""
    return beside(out.with_suffix("") if out.suffix in FILES else out, ".stages")


def plan_stages(
    stages: Sequence[Stage],
    where: Path | None,
    out: Path,
    plan: PlanStage,
    how: Mapping[str, Any],
    *,
    allow_unknown: bool = False,
) -> tuple[Stages, Recipe | JobRecipe]:
    """The plans of all stages but the last, and the last one's recipe, on stand-ins for the results that it takes.

    plan: from a stage, its recipe, the folder of its result, and the options `how` to its plan. Raises PlanError as
    that does. allow_unknown: of `Recipe.parse`.
    """
    *earlier, last = stages
    scratch = Scratch()
    plans: list[Planned] = []
    places, empty = places_of(earlier, stages_folder(out)), places_of(earlier, scratch.path)
    for stage in earlier:
        with in_stage(stage):
            recipe = parse_stage(stage, where, empty, allow_unknown=allow_unknown)
            plans.append(plan(stage, recipe, places[stage.name], how))
            stand_in(plans[-1], empty[stage.name])
    before = Stages(tuple(earlier), last, where, stages_folder(out), tuple(plans), how, scratch, allow_unknown)
    return before, parse_stage(last, where, empty, allow_unknown=allow_unknown)


def check_stages(
    planned: Planned,
    *,
    memory: int | None,
    threads: int | None,
    overwrite: bool,
    resume: bool,
    nan: Literal["error", "warn"],
) -> None:
    """Raise PlanError before the first stage runs if the memory does not suffice for all, or OUT may not be written.

    planned: the last stage. Without jobs a plan on stand-ins has the digest of that on the stages' results.
    """
    from mergekit_lfm.output.replace import already_there
    from mergekit_lfm.plan.budget import workers
    from mergekit_lfm.store.places import ANOTHER, IS

    assert planned.stages is not None
    folder, plans = planned.stages.folder, (*planned.stages.plans, planned)
    if folder.exists() and not folder.is_dir():
        raise PlanError(IS, place=folder, found="a file", expected="a folder for the results of stages", cure=ANOTHER)
    for each in plans:
        if isinstance(each, PlannedMerge):
            workers(each.plan, memory or default_memory(), threads, each.accelerator)
    inputs = {label: path for each in plans for label, path in _inputs_of(each).items()}
    if isinstance(planned, PlannedMerge) and planned.stages.final:
        plan, rebuild = planned.plan, overwrite or not resume
        already_there(plan.digest, plan.shards, inputs, planned.out, overwrite=overwrite, rebuild=rebuild, nan=nan)
    else:
        _check_place(planned, inputs, overwrite=overwrite)


def _inputs_of(planned: Planned) -> Mapping[str, Path]:
    """The paths that a stage reads, by label."""
    if isinstance(planned, PlannedJob):
        return planned.plan.request.paths
    return planned.plan.places


def _check_place(planned: Planned, inputs: Mapping[str, Path], *, overwrite: bool) -> None:
    """Raise PlanError if OUT may not be written, whatever its plan will be."""
    from mergekit_lfm.output.file_request import FileRequest
    from mergekit_lfm.output.lock import lock_name
    from mergekit_lfm.output.replace import check_folder
    from mergekit_lfm.store.places import check_apart, check_file, check_kind

    out = planned.out
    if isinstance(planned, PlannedJob) and isinstance(planned.plan.request, FileRequest):
        check_file(out, inputs.values(), overwrite=overwrite or planned.plan.request.is_kind(out))
    elif overwrite or not lock_name(out):
        check_folder(out, inputs, overwrite=overwrite)
    else:  # it may be the output of these stages, which the last one finds out
        check_apart(out, inputs)
        check_kind(out)


@contextmanager
def in_stage(stage: Stage | None) -> Iterator[None]:
    """Name the stage in the PlanErrors of its work; None for a recipe without stages."""
    try:
        yield
    except PlanError as error:
        if stage is None or str(error).startswith(stage.label):
            raise
        raise PlanError("{where}: {text}", where=stage.label, text=error, **error.parts) from None


def stand_in(planned: Planned, folder: Path) -> None:
    """Write something like the result of a plan: its headers and small files; the data take no space on the disk."""
    from mergekit_lfm.engine.documents import Documents

    if isinstance(planned, PlannedJob):
        planned.plan.stand_in(folder)
        return
    plan = planned.plan
    folder.mkdir()
    files = Documents(plan, folder.name).files
    for name, data in [*files.items(), *((shard.name, shard.header) for shard in plan.shards)]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for shard in plan.shards:
        os.truncate(folder / shard.name, shard.nbytes)
