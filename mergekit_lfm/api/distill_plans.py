"""Distillations that are planned: a training with teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lfm.api.tune_plans import PlannedTuning, plan_tuning
from mergekit_lfm.distill.course import Course, Pairs, even_pairs, labels_of
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import Progress
from mergekit_lfm.output.request import RequestInput
from mergekit_lfm.recipe.distill_recipe import ALIGNED, DistillRecipe
from mergekit_lfm.recipe.distill_terms import DISTILL_TERMS
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.views.adapted import open_found

if TYPE_CHECKING:
    from mergekit_lfm.api.lessons import Taught
    from mergekit_lfm.train.examples import Examples


DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depths")  # keys of configs


@dataclass(frozen=True)
class PlannedDistillation(PlannedTuning):
    """A distillation that is checked, and not done yet. teachers: the models, by the order of the recipe."""

    teachers: tuple[Checkpoint, ...] = ()

    @property
    def distillation(self) -> DistillRecipe:
        """The recipe."""
        assert isinstance(self.recipe, DistillRecipe)
        return self.recipe

    @property
    def others(self) -> tuple[RequestInput, ...]:
        labels = [entry.model for entry in self.distillation.teachers]
        return tuple(RequestInput(label, x, x.config) for label, x in zip(labels, self.teachers, strict=True))

    def name_publicly(self, whole: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
        teachers = [{**entry, "model": names[entry["model"]]} for entry in whole["teachers"]]
        return {**super().name_publicly(whole, names), "teachers": teachers}

    @cached_property
    def course(self) -> Course:
        """How the student follows the teachers. Raises PlanError if a config does not say how many layers there are."""
        recipe = self.distillation
        weights = {name: weight for name, weight in recipe.terms.items() if name in DISTILL_TERMS}
        pairs: list[Pairs] = [()] * len(self.teachers)
        if any(DISTILL_TERMS[name].layered for name in weights):
            pairs = [recipe.layers or self._even_pairs(teacher) for teacher in self.teachers]
        total = sum(entry.weight for entry in recipe.teachers)
        classes = [entry.classes for entry in recipe.teachers if entry.classes is not None]
        shares = [entry.weight / total for entry in recipe.teachers]
        widths = [self._shared_width(teacher) for teacher in self.teachers]
        heat = (recipe.temperature, recipe.divergence)
        return Course(recipe.task, weights, pairs, shares, *heat, classes, widths)

    def _shared_width(self, teacher: Checkpoint) -> int | None:
        """The words that the student and a teacher have both, where one vocabulary is longer than the other."""
        if self.recipe.task not in ("lm", "masked_lm", "seq2seq"):
            return None
        sizes = [_text_config(model.config).get("vocab_size") for model in (self.source, teacher)]
        known = [size for size in sizes if isinstance(size, int)]
        return min(known) if len({*known}) == 2 else None

    def _even_pairs(self, teacher: Checkpoint) -> Pairs:
        return even_pairs(_depth_of(self.source), _depth_of(teacher))

    @property
    def is_taught_before(self) -> bool:
        return self.distillation.is_cached

    def learn(self, examples: Examples, progress: Progress) -> Taught:
        from mergekit_lfm.api.lessons import learn

        return learn(self, self.distillation, self.course, self.teachers, examples, progress)


def plan_distillation(recipe: DistillRecipe, out: Path, *, device: str | None = None) -> PlannedDistillation:
    """Check a distillation, and say what it would make. It reads headers and configs only.

    Raises PlanError for teachers that do not fit the student, or without the device, FormatError for a damaged model.
    """
    planned = plan_tuning(recipe, out, device=device)
    teachers = tuple(open_found(found) for found in recipe.found_teachers)
    made = PlannedDistillation(planned.recipe, planned.out, planned.source, planned.device, teachers)
    _check_student(made)
    for number, teacher in enumerate(teachers):
        _check_teacher(made, number, teacher)
    _ = made.course
    _check_cache(made)
    return made


def _check_cache(planned: PlannedDistillation) -> None:
    """Raise PlanError for a cache that would be in the output, beside its state, or in a model that is read."""
    cache = planned.distillation.cache_folder
    if cache is None:
        return
    if cache.exists() and not cache.is_dir():
        raise PlanError(f"cache: {cache} is a file, expected a folder; choose another")
    models = [folder for model in (planned.source, *planned.teachers) for folder in model.folders]
    for place in (planned.out, planned.training, *models):
        if cache.resolve().is_relative_to(place.resolve()):
            raise PlanError(f"cache: {cache} is in {place}, expected a folder of its own; choose another")


def _check_student(planned: PlannedDistillation) -> None:
    """Raise PlanError if the student has other classes than the teachers together, or not the layers that are named."""
    recipe, labels = planned.distillation, labels_of(planned.source.config)
    last = max((entry.classes[1] for entry in recipe.teachers if entry.classes is not None), default=None)
    if last is not None and labels not in (None, last + 1):
        raise PlanError(
            f"the teachers' classes are 0 to {last}, and {recipe.model} has {labels}; expected as many. Make a student "
            f"with them by `mergekit-lfm head {recipe.model} --labels {last + 1}`"
        )
    _check_layers(planned.source, recipe.model, [mine for mine, _ in recipe.layers])


def _check_layers(model: Checkpoint, name: str, layers: Sequence[int]) -> None:
    count = _find_depth(_text_config(model.config))
    wrong = [layer for layer in layers if count is not None and layer > count]
    if wrong:
        raise PlanError(f"layers: found {wrong[0]}, and {name} has {count} layers; expected 0 to {count}")


def _check_teacher(planned: PlannedDistillation, number: int, teacher: Checkpoint) -> None:
    """Raise PlanError if the configs show that the student cannot follow a teacher."""
    recipe, entry = planned.distillation, planned.distillation.teachers[number]
    _check_layers(teacher, entry.model, [theirs for _, theirs in recipe.layers])
    models = (planned.source, teacher)
    aligned, labels = [name for name in ALIGNED if name in recipe.terms], [labels_of(x.config) for x in models]
    if recipe.task == "classification" and aligned and None not in labels:
        if entry.classes is None:
            wanted, found = labels[0], "all classes of the student"
        else:
            wanted, found = entry.classes[1] - entry.classes[0] + 1, f"classes {entry.classes[0]} to {entry.classes[1]}"
        if wanted != labels[1]:
            raise PlanError(
                f"teachers[{number}]: {entry.model} has {labels[1]} classes, expected {wanted}, for {found}; give its "
                "`classes`, or use terms that compare vectors, as triplet, in place of " + " and ".join(aligned)
            )
    heads = [_text_config(x.config).get("num_attention_heads") for x in models]
    if "attention" in recipe.terms and None not in heads and heads[0] != heads[1]:
        raise PlanError(
            f"attention: {recipe.model} has {heads[0]} heads in a layer and {entry.model} {heads[1]}; expected as "
            "many. Leave attention out of the loss"
        )


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def _find_depth(config: Mapping[str, Any]) -> int | None:
    """The layers that a config counts, or the stages of a network for images."""
    counts = (config.get(key) for key in DEPTHS)
    return next((count if isinstance(count, int) else len(count) for count in counts if count), None)


def _depth_of(model: Checkpoint) -> int:
    depth = _find_depth(_text_config(model.config))
    if depth is None:
        raise PlanError(f"the config of {model.path} does not say how many layers there are; give `layers`")
    return depth
