"""Merges that are planned, and those that are made: one, or the stages of a recipe."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import TYPE_CHECKING
from weakref import finalize

from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.machine.accelerators import Accelerator
from mergekit_lfm.recipe.form import Push
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.stages import Stage

if TYPE_CHECKING:
    from mergekit_lfm.output.push import Pushed
    from mergekit_lfm.plan.plan import Plan


@dataclass(frozen=True)
class PlannedMerge:
    """A merge that is planned and checked, and not made yet. goal: where the result is pushed, None for nowhere.

    stages: those before it, if its recipe has several.
    """

    plan: Plan
    out: Path
    accelerator: Accelerator
    goal: Push | None
    max_shard_size: int | None
    stages: Stages | None = None


@dataclass(frozen=True)
class Merged:
    """The result of a merge. resumed_bytes: written by an earlier, interrupted run. pushed: None without a push.

    stages: the outcomes of the recipe's earlier stages.
    """

    plan: Plan
    resumed_bytes: int = 0
    pushed: Pushed | None = None
    stages: tuple[Outcome[Merged], ...] = ()


class Scratch:
    """A temporary folder that is there as long as this object."""

    def __init__(self) -> None:
        self.path = Path(mkdtemp(prefix="mergekit_lfm-stages-"))
        finalize(self, rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True)
class Stages:
    """The stages of a recipe in the order of work, but for the last, and their plans.

    where: the recipe's folder. folder: that of their results. scratch: the stand-ins, as long as the plans are used.
    allow_unknown: of `Recipe.parse`.
    """

    stages: tuple[Stage, ...]
    last: Stage
    where: Path | None
    folder: Path
    plans: tuple[PlannedMerge, ...]
    scratch: Scratch
    allow_unknown: bool = False

    def recipe(self, stage: Stage) -> Recipe:
        """The recipe of a stage, on the results of those before it."""
        folders = {each.name: self.folder / each.name for each in self.stages if each.name in stage.needs}
        return Recipe.parse(stage.data, self.where, stage.label, folders, allow_unknown=self.allow_unknown)

    def drop(self) -> None:
        """Remove the results of the stages."""
        from mergekit_lfm.output.lock import LOCK
        from mergekit_lfm.store.places import remove

        for stage in self.stages:
            if (self.folder / stage.name / LOCK).is_file():
                remove(self.folder / stage.name)
        with suppress(OSError):  # it holds something else, too
            self.folder.rmdir()
