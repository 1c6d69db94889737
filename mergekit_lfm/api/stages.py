"""Recipes of several stages: planned all together before the first one runs, and carried out one after the other.

A stage that is still to run is planned on a stand-in for the results that it takes: their headers and small files, over
files without data. The results lie in OUT.stages, under the names of their stages, and each is made again only if its
stage has changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mergekit_lfm.api.planned import PlannedMerge, Scratch, Stages
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.resources import default_memory
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.stages import Stage
from mergekit_lfm.store.places import beside

if TYPE_CHECKING:
    from mergekit_lfm.plan.plan import Plan


def stages_folder(out: Path) -> Path:
    """The folder of what the stages of an output leave."""
    return beside(out, ".stages")


def plan_stages(
    stages: Sequence[Stage],
    where: Path | None,
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
        with in_stage(stage):
            plans.append(plan(parse(stage), stages_folder(out) / stage.name))
        folders[stage.name] = scratch.path / stage.name
        stand_in(plans[-1].plan, folders[stage.name])
    stages_before = Stages(tuple(earlier), last, where, stages_folder(out), tuple(plans), scratch, allow_unknown)
    return stages_before, parse(last)


def check_stages(
    planned: PlannedMerge,
    *,
    memory: int | None,
    threads: int | None,
    overwrite: bool,
    resume: bool,
    nan: Literal["error", "warn"],
) -> None:
    """Raise PlanError before the first stage runs if the memory does not suffice for all, or OUT may not be written.

    planned: the merge of the last stage. A plan on stand-ins has the digest of that on the stages' results.
    """
    from mergekit_lfm.output.replace import already_there
    from mergekit_lfm.plan.budget import workers
    from mergekit_lfm.store.places import ANOTHER, IS

    assert planned.stages is not None
    folder, plans = planned.stages.folder, (*planned.stages.plans, planned)
    if folder.exists() and not folder.is_dir():
        raise PlanError(IS, place=folder, found="a file", expected="a folder for the results of stages", cure=ANOTHER)
    for each in plans:
        workers(each.plan, memory or default_memory(), threads, each.accelerator)
    plan, rebuild = planned.plan, overwrite or not resume
    inputs = {label: path for each in plans for label, path in each.plan.places.items()}
    already_there(plan.digest, plan.shards, inputs, planned.out, overwrite=overwrite, rebuild=rebuild, nan=nan)


@contextmanager
def in_stage(stage: Stage | None) -> Iterator[None]:
    """Name the stage in the PlanErrors of its work; None for a recipe without stages."""
    try:
        yield
    except PlanError as error:
        if stage is None or str(error).startswith(stage.label):
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
