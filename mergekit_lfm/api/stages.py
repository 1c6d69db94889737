"""Recipes of several stages: planned all together before the first one runs, and carried out one after the other.

A stage that is still to run is planned on a stand-in for the results that it takes: their headers and small files, over
files without data. What a stage leaves lies in OUT.stages, under the stage's name, and is not made again unless the
stage has changed.
"""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Literal

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.resources import default_memory
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.stages import Stage

if TYPE_CHECKING:
    from mergekit_lfm.api.merge import PlannedMerge
    from mergekit_lfm.plan.plan import Plan


@dataclass(frozen=True)
class Stages:
    """The stages of a recipe in the order of work, but for the last, and their plans.

    where: the recipe's folder. folder: that of their results. scratch: that of the stand-ins, as long as the plans are
    used.
    """

    stages: tuple[Stage, ...]
    last: Stage
    where: Path
    folder: Path
    plans: tuple[PlannedMerge, ...]
    scratch: Path

    def __post_init__(self) -> None:
        weakref.finalize(self, shutil.rmtree, self.scratch, ignore_errors=True)

    def recipe(self, stage: Stage) -> Recipe:
        """The recipe of a stage, on the results of those before it."""
        folders = {each.name: self.folder / each.name for each in self.stages if each.name in stage.needs}
        return Recipe.parse(stage.data, self.where, stage.label, folders)

    def drop(self) -> None:
        """Remove the results of the stages."""
        from mergekit_lfm.output.lock import LOCK
        from mergekit_lfm.store.places import remove

        for stage in self.stages:
            if (self.folder / stage.name / LOCK).is_file():
                remove(self.folder / stage.name)
        with suppress(OSError):  # it holds something else, too
            self.folder.rmdir()


def stages_folder(out: Path) -> Path:
    """The folder of what the stages of an output leave."""
    return out.with_name(f"{out.name}.stages")


def plan_stages(
    stages: Sequence[Stage], where: Path, out: Path, plan: Callable[[Recipe, Path], PlannedMerge]
) -> tuple[Stages, Recipe]:
    """The plans of all stages but the last, and the last one's recipe, on stand-ins for the results that it takes.

    plan: from a recipe and the folder of its result to its plan. Raises PlanError as that does.
    """
    *earlier, last = stages
    scratch = Path(mkdtemp(prefix="mergekit_lfm-stages-"))
    folders = {stage.name: scratch / stage.name for stage in earlier}
    plans: list[PlannedMerge] = []
    try:
        for stage in earlier:
            with in_stage(stage):
                plans.append(plan(_parse(stage, where, folders), stages_folder(out) / stage.name))
            stand_in(plans[-1].plan, folders[stage.name])
        recipe = _parse(last, where, folders)
    except BaseException:
        shutil.rmtree(scratch)
        raise
    return Stages(tuple(earlier), last, where, stages_folder(out), tuple(plans), scratch), recipe


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

    assert planned.stages is not None
    plans = (*planned.stages.plans, planned)
    for each in plans:
        workers(each.plan, memory or default_memory(), threads, each.accelerator)
    plan, rebuild = planned.plan, overwrite or not resume
    sources = [pair for each in plans for pair in zip(each.plan.source_labels, each.plan.sources, strict=True)]
    inputs = {label: source.path for label, source in sources}
    already_there(plan.digest, plan.shards, inputs, planned.out, overwrite=overwrite, rebuild=rebuild, nan=nan)


def _parse(stage: Stage, where: Path, folders: Mapping[str, Path]) -> Recipe:
    used = {name: folders[name] for name in stage.needs}
    return Recipe.parse(stage.data, where, stage.label, used)


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
