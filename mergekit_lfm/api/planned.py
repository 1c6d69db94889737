"""Merges and jobs that are planned, and merges that are made: one, or the stages of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any
from weakref import finalize

from mergekit_lfm.api.jobs import Job, JobPlan, JobRecipe, find_job
from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.machine.accelerators import Accelerator
from mergekit_lfm.recipe.form import Push
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.stages import Stage

if TYPE_CHECKING:
    from mergekit_lfm.output.outgoing import Pushed
    from mergekit_lfm.plan.plan import Plan


@dataclass(frozen=True)
class PlannedMerge:
    """A merge that is planned and checked, and not made yet. goal: where the result is pushed, None for nowhere.

    stages: those before it, if its recipe has several. staged: True if OUT is in a bucket, and `out` a folder of the
    cache until it is pushed there.
    """

    plan: Plan
    out: Path
    accelerator: Accelerator
    goal: Push | None
    max_shard_size: int | None
    stages: Stages | None = None
    staged: bool = False


@dataclass(frozen=True)
class PlannedJob:
    """A job that is planned and checked, and not done yet. stages: those before it, if its recipe has several."""

    job: Job
    plan: JobPlan
    stages: Stages | None = None

    @property
    def out(self) -> Path:
        """The place of its result."""
        return self.plan.out


Planned = PlannedMerge | PlannedJob


@dataclass(frozen=True)
class Merged:
    """The result of a merge. resumed_bytes: written by an earlier, interrupted run. pushed: None without a push.

    stages: the outcomes of the recipe's earlier stages. waiting: True after a part of the work, if OUT is not there
    yet, as other parts are not done.
    """

    plan: Plan
    resumed_bytes: int = 0
    pushed: Pushed | None = None
    stages: tuple[Outcome[Any], ...] = ()
    waiting: bool = False


class Scratch:
    """A temporary folder that is there as long as this object."""

    def __init__(self) -> None:
        self.path = Path(mkdtemp(prefix="mergekit_lfm-stages-"))
        finalize(self, rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True)
class Stages:
    """The stages of a recipe in the order of work, but for the last, and their plans.

    where: the recipe's folder. folder: that of their results. how: the options of their plans. scratch: the stand-ins,
    as long as the plans are used. allow_unknown: of `Recipe.parse`.
    """

    stages: tuple[Stage, ...]
    last: Stage
    where: Path | None
    folder: Path
    plans: tuple[Planned, ...]
    how: Mapping[str, Any]
    scratch: Scratch
    allow_unknown: bool = False

    @property
    def final(self) -> bool:
        """True if the plans on stand-ins are those on the results: only data decide the ranks that jobs leave."""
        return all(isinstance(plan, PlannedMerge) for plan in self.plans)

    def recipe(self, stage: Stage) -> Recipe | JobRecipe:
        """The recipe of a stage, on the results of those before it."""
        return parse_stage(stage, self.where, self.places, allow_unknown=self.allow_unknown)

    @property
    def places(self) -> dict[str, Path]:
        """The results of the stages by their names."""
        return places_of(self.stages, self.folder)

    def findings(self, outcomes: Sequence[Outcome[Any]]) -> tuple[str, ...]:
        """The warnings in the outcomes of the stages, each with the name of its stage."""
        pairs = zip(self.stages, outcomes, strict=True)
        return tuple(f"stage {stage.name}: {line}" for stage, outcome in pairs for line in outcome.warnings)

    def drop(self) -> None:
        """Remove the results of the stages."""
        from mergekit_lfm.output.file_request import files_beside
        from mergekit_lfm.output.lock import LOCKS
        from mergekit_lfm.store.places import remove

        for place in self.places.values():
            if place.is_file() or any((place / name).is_file() for name in LOCKS):
                remove(place)
                for path in files_beside(place):
                    path.unlink(missing_ok=True)
        with suppress(OSError):  # it holds something else, too
            self.folder.rmdir()


def places_of(stages: Iterable[Stage], folder: Path) -> dict[str, Path]:
    """The results of stages in a folder, by the names of the stages; and what a stage makes besides, by its own."""
    places = {stage.name: folder / f"{stage.name}{suffix_of(stage)}" for stage in stages}
    return places | {name: folder / name for stage in stages for name in stage.besides}


def suffix_of(stage: Stage) -> str:
    """The end of the name of a stage's result: that of a file, or "" for a folder."""
    job = find_job(stage.data, stage.label)
    return "" if job is None else job.suffix(stage.data)


def parse_stage(
    stage: Stage, where: Path | None, places: Mapping[str, Path], *, allow_unknown: bool
) -> Recipe | JobRecipe:
    """The recipe of a stage. where: the recipe's folder. places: the results of the stages before it."""
    job = find_job(stage.data, stage.label)
    parse = Recipe.parse if job is None else job.parse
    needed = {name: places[name] for name in stage.takes}
    return parse(stage.data, where, stage.label, needed, allow_unknown=allow_unknown)


def plan_job(job: Job, recipe: JobRecipe, out: Path, how: Mapping[str, Any]) -> PlannedJob:
    """A job's plan from its recipe and the folder of its result. how: options of `plan_recipe`; it takes its own."""
    own = {name: how[name] for name in sorted(job.plan_options) if how.get(name) is not None}
    return PlannedJob(job, job.plan(recipe, out, **own))
