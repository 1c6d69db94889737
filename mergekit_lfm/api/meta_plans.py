"""Meta-learnings that are planned: a training over episodes, and what it will hold in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lfm.api.tune_plans import PlannedTuning, plan_tuning
from mergekit_lfm.distill.course import labels_of
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.launch import is_launched
from mergekit_lfm.machine.progress import Progress
from mergekit_lfm.machine.resources import total_memory
from mergekit_lfm.output.request import RequestInput
from mergekit_lfm.recipe.meta_memory import Need, estimate_need
from mergekit_lfm.recipe.meta_recipe import MetaRecipe
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tensors import FLOATS
from mergekit_lfm.views.adapted import open_found

if TYPE_CHECKING:
    from mergekit_lfm.api.meta_lessons import MetaLessons
    from mergekit_lfm.train.examples import Examples


@dataclass(frozen=True)
class PlannedMeta(PlannedTuning):
    """A meta-learning that is checked, and not done yet. texts: the model that makes vectors of classes' names."""

    texts: Checkpoint | None = None

    @property
    def meta(self) -> MetaRecipe:
        """The recipe."""
        assert isinstance(self.recipe, MetaRecipe)
        return self.recipe

    def name_publicly(self, whole: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
        public = super().name_publicly(whole, names)
        if "test" in whole:
            data = [{**entry, "path": names[entry["path"]]} for entry in whole["test"]["data"]]
            public["test"] = {**whole["test"], "data": data}
        if "texts" in whole:
            public["texts"] = {**whole["texts"], "model": names[whole["texts"]["model"]]}
        return public

    @property
    def others(self) -> tuple[RequestInput, ...]:
        texts, entry = self.texts, self.meta.texts
        return () if texts is None or entry is None else (RequestInput(entry.model, texts, texts.config),)

    def learn(self, examples: Examples, progress: Progress) -> MetaLessons:
        from mergekit_lfm.api.meta_lessons import MetaLessons

        return MetaLessons(self, self.meta, examples, progress, self.texts)

    @cached_property
    def need(self) -> Need | None:
        """The memory of a step, in bytes; None for a model whose config does not say how large its activations are."""
        recipe = self.meta
        numbers = sum(spec.numel for spec in self.source.values() if spec.dtype in FLOATS)
        return estimate_need(recipe, self.source.config, numbers)


def plan_meta(recipe: MetaRecipe, out: Path, *, device: str | None = None, memory: int | None = None) -> PlannedMeta:
    """Check a meta-learning, and say what it would make. It reads headers and configs only.

    memory: a budget in bytes, by default the machine's. Raises PlanError for a head of other classes than an
    episode's, and for a step that needs more than the budget; and the errors of `plan_tuning`.
    """
    tuning = plan_tuning(recipe, out, device=device)
    texts = None if recipe.found_texts is None else open_found(recipe.found_texts)
    planned = PlannedMeta(tuning.recipe, tuning.out, tuning.source, tuning.device, texts)
    labels = labels_of(planned.source.config)
    if recipe.ways is not None and labels not in (None, recipe.ways):
        raise PlanError(
            f"{recipe.model} has {labels} classes, and an episode {recipe.ways}; expected as many. Make a model with "
            f"them by `mergekit-lfm head {recipe.model} --labels {recipe.ways}`, or set ways to {labels}"
        )
    if is_launched() and (recipe.on_disk or recipe.row.whole):
        reason = (
            "whose processes share a folder instead"
            if recipe.on_disk
            else "whose steps depend on all tasks or on those before"
        )
        raise PlanError(f"torchrun shares no {recipe.algorithm}{' on disk' * recipe.on_disk}, {reason}; start it alone")
    if planned.need is not None and planned.device == "cpu":
        planned.need.check(total_memory() if memory is None else memory)
    return planned
