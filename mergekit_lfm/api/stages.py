"""Recipes of several stages: planned all together before the first one runs, and carried out one after the other.

A stage that is still to run is planned on a stand-in for the results that it takes: their headers and small files, over
files without data. The results lie in OUT.stages, under the names of their stages, and each is made again only if its
stage has changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mergekit_lfm.api.planned import PlannedMerge, Scratch, Stages
from mergekit_lfm.errors import PlanError
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.stages import Stage
from mergekit_lfm.store.places import beside

if TYPE_CHECKING:
    from mergekit_lfm.plan.plan import Plan

T = TypeVar("T")


def stages_folder(out: Path) -> Path:
    """The folder of what the stages of an output leave."""
    return beside(out, ".stages")


def plan_stages(
    stages: Sequence[Stage],
    where: Path,
    out: Path,
    plan: Callable[[Recipe, Path], PlannedMerge],
    *,
    allow_unknown: bool = False,
) -> tuple[Stages, Recipe]:
    """The plans of all stages but the last, and the last one's recipe, on stand-ins for the results that it takes.

    plan: from a recipe and the folder of its result to its plan. Raises PlanError as that does. allow_unknown: of
    `Recipe.parse`.
    """

    def parse(stage: Stage) -> Recipe:
        used = {name: folders[name] for name in stage.needs}
        return Recipe.parse(stage.data, where, stage.label, used, allow_unknown=allow_unknown)

    *earlier, last = stages
    scratch = Scratch()
    folders: dict[str, Path] = {}
    plans: list[PlannedMerge] = []
    for stage in earlier:
        planned = _in_stage(stage, lambda stage: plan(parse(stage), stages_folder(out) / stage.name))
        plans.append(planned)
        folders[stage.name] = scratch.path / stage.name
        stand_in(planned.plan, folders[stage.name])
    stages_before = Stages(tuple(earlier), last, where, stages_folder(out), tuple(plans), scratch, allow_unknown)
    return stages_before, parse(last)


def check_places(planned: PlannedMerge, folder: Path, *, kept: bool) -> None:
    """Raise PlanError, before any stage runs, about a `folder` for their results or an output that cannot be.

    planned: the last stage. kept: its output is there, and must not be replaced.
    """
    from mergekit_lfm.engine.public import public_recipe
    from mergekit_lfm.output.lock import lock_of
    from mergekit_lfm.store.places import ANOTHER, IS, OVERWRITE

    if folder.exists() and not folder.is_dir():
        raise PlanError(IS, place=folder, found="a file", expected="a folder for the results of stages", cure=ANOTHER)
    recipe = json.loads(json.dumps(public_recipe(planned.plan)))
    if kept and lock_of(planned.out).get("recipe") != recipe:
        sentence = "{place} exists and is not the output of this merge; {cure}"
        raise PlanError(sentence, place=planned.out, cure=OVERWRITE)


def _in_stage(stage: Stage, work: Callable[[Stage], T]) -> T:
    """The result of work on a stage, whose name its errors tell."""
    try:
        return work(stage)
    except PlanError as error:
        if str(error).startswith(stage.label):
            raise
        raise PlanError("{where}: {text}", where=stage.label, text=error, **error.parts) from None


def stand_in(plan: Plan, folder: Path) -> None:
    """Write a folder like the output of a plan: its headers and small files; the data take no space on the disk."""
    from mergekit_lfm.engine.documents import Documents

    folder.mkdir()
    files = Documents(plan, folder.name).files
    for name, data in [*files.items(), *((shard.name, shard.header) for shard in plan.shards)]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for shard in plan.shards:
        os.truncate(folder / shard.name, shard.nbytes)
