"""Cut models into what the parts of a recipe see: all tensors, those of a module, or some layers under new numbers.

A plan matches the tensors of each part as if these were its models; its jobs read the models themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from mergekit_lfm.arch.depth import kinds_of, stack_config
from mergekit_lfm.arch.layer_facts import stacks_of as config_stacks
from mergekit_lfm.arch.modules import beginnings, find_modules
from mergekit_lfm.errors import PlanError, did_you_mean, several
from mergekit_lfm.plan.layers import find_layers
from mergekit_lfm.plan.stack import Stack, count_layers, find_stack, heads_of, is_all, names_in_slice
from mergekit_lfm.recipe.parts import Input, Layer, Part, copy_of
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.views.selected import Selected


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a recipe, its models as it sees them, and the layers of its tensors: index and count.

    stack: of a slice that is not all layers, what the names of the layers begin with.
    """

    part: Part
    models: tuple[Checkpoint, ...]
    layers: Mapping[str, Layer]
    stack: str | None = None


@dataclass(frozen=True, slots=True)
class Stacked:
    """Layers of the output that slices make: what their names begin with, and the model and the layer of each in it.

    count: the number of the template's layers.
    """

    prefix: str
    count: int
    layers: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Pieces:
    """The pieces of a plan. notices: what they leave to the base."""

    pieces: tuple[Piece, ...]
    notices: tuple[str, ...] = ()


def cut_pieces(recipe: Recipe, models: Sequence[Checkpoint]) -> Pieces:
    """The pieces of a recipe's `all_models`. Raises PlanError about all layers and modules that they do not have."""
    opened = dict(zip(recipe.all_models, models, strict=True))
    template = opened[recipe.template]
    wanted = list(dict.fromkeys(part.module for part in recipe.parts if part.module is not None))
    members = _modules_of(wanted, template, models) if wanted else {}
    sight = _Sight(opened, members)
    pieces, problems = list[Piece](), list[str]()
    for part in recipe.parts:
        home = next((model for model in part.models if model == recipe.template), part.models[0])
        try:
            pieces.append(_cut(part, sight, home, recipe.template))
        except PlanError as error:
            problems.append(str(error))
    if problems:
        raise PlanError(several("slices do not fit the models", problems))
    notices: tuple[str, ...] = ()
    if wanted:
        taken = {name for names in members.values() for name in names}
        rest = [name for name in template if name not in taken]
        if rest:
            part = copy_of(recipe.template, "modules", None)
            pieces.append(Piece(part, (Selected(template, {name: name for name in rest}),), find_layers(template)))
            which = f"{len(rest)} tensors, such as {rest[0]}, are" if len(rest) > 1 else f"{rest[0]} is"
            notices = (f"{which} in no module of the recipe, and copied from {recipe.template.label}",)
    return Pieces(tuple(pieces), notices)


def _modules_of(
    wanted: Sequence[str], template: Checkpoint, models: Sequence[Checkpoint]
) -> dict[str, dict[str, None]]:
    """The names of the tensors of each module. Raises PlanError about all that have none."""
    members = find_modules(wanted, dict.fromkeys(name for model in (template, *models) for name in model))
    known = beginnings(template, find_layers(template))
    lost = [
        f"modules.{module}: no tensor belongs to it; {did_you_mean(module, known)}"
        for module in wanted
        if not members[module]
    ]
    if lost:
        raise PlanError(several("modules do not fit the models", lost))
    return members


class _Sight:
    """The models as the modules see them. A model is looked at once for all of its slices. members: by module."""

    def __init__(self, models: Mapping[Input, Checkpoint], members: Mapping[str, Mapping[str, None]]) -> None:
        self._models, self._members = models, members
        self._seen = dict[tuple[Input, str | None], Checkpoint]()
        self._stacks = dict[tuple[Input, str | None], Stack]()

    def see(self, model: Input, module: str | None) -> Checkpoint:
        """The model's tensors of a module; all of them for None."""
        if (model, module) not in self._seen:
            checkpoint, names = self._models[model], self._members.get(module or "")
            inside = None if names is None else {name: name for name in checkpoint if name in names}
            self._seen[model, module] = checkpoint if inside is None else Selected(checkpoint, inside)
        return self._seen[model, module]

    def stack(self, model: Input, module: str | None) -> Stack:
        """The layers of the model in a module. Raises PlanError if there are several stacks."""
        if (model, module) not in self._stacks:
            self._stacks[model, module] = find_stack(self.see(model, module), model.label)
        return self._stacks[model, module]


def _cut(part: Part, sight: _Sight, home: Input, template: Input) -> Piece:
    """A part with its tensors; those in layers of a slice have their numbers in the output. home: names the tensors."""
    seen = {model: sight.see(model, part.module) for model in part.models}
    alone = part.slice is not None and part.slice.of == 1 and template in part.models
    if part.slice is None or (alone and all(is_all(model, checkpoint) for model, checkpoint in seen.items())):
        return Piece(part, tuple(seen.values()), find_layers(seen[home]))
    views, layers, prefix = list[Checkpoint](), dict[str, Layer](), ""
    for line, model in seen.items():
        stack = sight.stack(line, part.module)
        names = dict(names_in_slice(part.slice, line, stack))
        if part.slice.index == part.slice.of - 1:
            names |= heads_of(model, sight.see(template, part.module))
        views.append(Selected(model, names))
        if line == home:
            assert line.layers is not None
            first, count, prefix = line.layers[0], part.slice.layers, stack.prefix
            layers = {
                new: (stack.places[old].index - first, count) for new, old in names.items() if old in stack.places
            }
    return Piece(part, tuple(views), layers, prefix)


def stacks_of(pieces: Sequence[Piece], recipe: Recipe, models: Sequence[Checkpoint]) -> tuple[Stacked, ...]:
    """The stacks of a recipe's slices. Raises PlanError if a slice merges layers of different kinds."""
    index = {model: i for i, model in enumerate(recipe.all_models)}
    layers: dict[str, list[tuple[int, int]]] = {}
    problems = list[str]()
    for piece in pieces:
        part, prefix = piece.part, piece.stack
        if prefix is None:
            continue
        home = recipe.template if recipe.template in part.models else part.models[0]
        spans = {index[model]: model.layers for model in (home, *part.models) if model.layers is not None}
        first, *others = ([(i, layer) for layer in range(*span)] for i, span in spans.items())
        layers.setdefault(prefix, []).extend(first)
        problems += [line for other in others for line in _other_kinds(part, models, first, other)]
    if problems:
        raise PlanError(several("slices merge layers of different kinds", problems))
    template = models[index[recipe.template]]
    return tuple(Stacked(prefix, count_layers(template, prefix), tuple(own)) for prefix, own in layers.items())


def stacked_config(
    config: Mapping[str, Any], stacks: Sequence[Stacked], models: Sequence[Checkpoint]
) -> dict[str, Any]:
    """A copy of the template's config that is about the stacked layers. Raises PlanError if it cannot be."""
    result = deepcopy(dict(config))
    for stack in stacks if config_stacks(config) else ():
        origins = [(models[i].config, layer) for i, layer in stack.layers]
        result = stack_config(result, origins, stack.count, stack.prefix)
    return result


def _other_kinds(
    part: Part, models: Sequence[Checkpoint], one: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]]
) -> Iterator[str]:
    """The layers that a slice merges though they are of different kinds by their configs."""
    for (i, layer), (j, theirs) in zip(one, other, strict=True):
        if not (config_stacks(models[i].config) and config_stacks(models[j].config)):
            continue
        kinds, others = kinds_of(models[i].config, layer), kinds_of(models[j].config, theirs)
        for name in (name for name in kinds if name in others and kinds[name] != others[name]):
            yield (
                f"{part.place}: layer {layer} has {name} {kinds[name]!r}, and layer {theirs}, with which it is merged, "
                f"{others[name]!r}; choose layers of one kind"
            )


def unused_names(
    pieces: Iterable[Piece], recipe: Recipe, models: Sequence[Checkpoint]
) -> Iterator[tuple[str, str, str]]:
    """The tensors of the models that no piece has: (model, tensor, reason)."""
    opened = dict(zip(recipe.all_models, models, strict=True))
    used: dict[int, set[str]] = {id(checkpoint): set() for checkpoint in models}  # a model may be in a slice twice
    for piece in pieces:
        for model, view in zip(piece.part.models, piece.models, strict=True):
            own = (view.source(name)[1] for name in view) if isinstance(view, Selected) else view
            used[id(opened[model])].update(own)
    why = "in no module of the recipe" if recipe.modules else "in no slice of the recipe"
    for model, checkpoint in opened.items():
        taken = used.pop(id(checkpoint), None)
        left = [] if taken is None else [name for name in checkpoint if name not in taken]
        yield from ((model.label, checkpoint.name_in_files(name), why) for name in left)
