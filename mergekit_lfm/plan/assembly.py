"""Whether slices and modules of several models make one model: that which the config of the template describes.

Each part fits the models that it is merged from. Beside one another they may still have other sizes, another number of
layers, or a head that loaders would not find, as the config goes with the template alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mergekit_lfm.arch.depth import kinds_of
from mergekit_lfm.arch.layer_facts import stacks_of
from mergekit_lfm.arch.ties import is_tied, tied_names
from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.plan.job import Job
from mergekit_lfm.plan.layers import Place, find_places
from mergekit_lfm.plan.pieces import Stacked
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.checkpoint import Checkpoint

Shapes = Mapping[tuple[str, str], dict[tuple[int, ...], str]]  # and a tensor of each, by the names but for the layer


def refuse_patchwork(
    recipe: Recipe, jobs: Sequence[Job], models: Sequence[Checkpoint], template: int, stacks: Sequence[Stacked]
) -> None:
    """Raise PlanError about all tensors of the output that the template's config does not describe."""
    if not (recipe.slices or recipe.modules) or not models[template].config:
        return
    made = {name: job for job in jobs for name in job.names}
    label = recipe.template.label
    problems = [
        *_other_depths(made, models[template], stacks, label),
        *_other_shapes(recipe, made, models, template),
        *_lost_heads(recipe, made, models, template),
    ]
    if problems:
        raise PlanError(several("the parts of the recipe do not make one model", problems))


def _other_depths(
    made: Mapping[str, Job], template: Checkpoint, stacks: Sequence[Stacked], label: str
) -> Iterator[str]:
    """The stacks of layers that have another number of them than the template; slices have changed the config."""
    counts, stacked = _counts(find_places(template)), {stack.prefix for stack in stacks}
    for before, count in _counts(find_places(made)).items():
        if before not in stacked and counts.get(before, count) != count:
            yield (
                f"the output would have {count} layers {before}*, and {label}, whose config it has, {counts[before]}: "
                "take the layers with `slices`, or another `base_model`"
            )


def _counts(places: Mapping[str, Place]) -> dict[str, int]:
    return {place.before: place.count for place in places.values()}


def _other_shapes(
    recipe: Recipe, made: Mapping[str, Job], models: Sequence[Checkpoint], template: int
) -> Iterator[str]:
    """The tensors of other shapes than in the template, unless shapes differ from layer to layer."""
    if any(map(_states_sizes, models)):
        return
    known = [_shapes({name: spec.shape for name, spec in model.items()}) for model in models]
    found = _shapes({name: job.shape for name, job in made.items() if not any(part in name for part in recipe.keep)})
    for key, shapes in found.items():
        expected = known[template].get(key)
        if expected is None or any(len(own.get(key, ())) > 1 for own in known):
            continue
        for shape, name in shapes.items():
            if shape not in expected:
                own = list(next(iter(expected)))
                label = recipe.template.label
                yield (
                    f"{name} would be {list(shape)}, and {own} in {label}, whose config the output has: take models of "
                    "one size"
                )


def _states_sizes(model: Checkpoint) -> bool:
    """True if a config gives layers sizes of their own."""
    if not stacks_of(model.config):
        return False
    return any(
        isinstance(fact, Mapping | int) and not isinstance(fact, bool) for fact in kinds_of(model.config, 0).values()
    )


def _shapes(tensors: Mapping[str, tuple[int, ...]]) -> Shapes:
    """The shapes that tensors have in all layers."""
    places, shapes = find_places(tensors), dict[tuple[str, str], dict[tuple[int, ...], str]]()
    for name, shape in tensors.items():
        key = (places[name].before, places[name].behind) if name in places else (name, "")
        shapes.setdefault(key, {}).setdefault(shape, name)
    return shapes


def _lost_heads(recipe: Recipe, made: Mapping[str, Job], models: Sequence[Checkpoint], template: int) -> Iterator[str]:
    """The heads that loaders would not find, as the template's config does not tie them."""
    if is_tied(models[template].config) is not False:
        return
    for group in tied_names(dict.fromkeys([*models[template], *made])):
        there = [name for name in group if name in made]
        lacking = [name for name in group if name in models[template] and name not in made]
        if there and not any(part in name for part in recipe.keep for name in lacking):
            yield from (
                f"the output would lack {name}, since the model that it would come from ties it to {there[0]}, and "
                f"{recipe.template.label}, whose config it has, does not: name the other model as `base_model`, or "
                "take the part from a model that does not tie them"
                for name in lacking
            )
