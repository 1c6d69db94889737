"""Cut models into what the parts of a recipe see: all tensors, those of a module, or some layers under new numbers.

No table says which tensors exist. Layers are found in the names, per prefix; what is in no layer belongs to the first
slice if it is before the layers (embeddings), else to the last (norms, heads).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from mergekit_lfm.arch.depth import kinds_of, stack_config
from mergekit_lfm.arch.layer_facts import stacks_of as config_stacks
from mergekit_lfm.arch.modules import beginnings, find_modules
from mergekit_lfm.arch.ties import is_tied, tied_names
from mergekit_lfm.errors import PlanError, did_you_mean, several
from mergekit_lfm.plan.layers import Place, find_layers, find_places
from mergekit_lfm.recipe.parts import Input, Layer, Part, copy_of
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.views.selected import Selected

BEFORE = re.compile(
    r"(^|[._])(w[tp]e|shared|\w*embed\w*|\w*patch\w*|conv\w*|stem|position\w*|tok_\w+|relative_\w+)([._]|$)"
)
AFTER = re.compile(r"(^|\.)(embed_out|lm_head|output|predictions)\.")
EXTRA = re.compile(r"(^|\.)mtp\.")  # layers that predict further tokens, beside the stack


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
    index = {model: i for i, model in enumerate(recipe.all_models)}
    template = models[index[recipe.template]]
    wanted = list(dict.fromkeys(part.module for part in recipe.parts if part.module is not None))
    members = _modules_of(wanted, template, models) if wanted else {}
    pieces, problems = list[Piece](), list[str]()
    for part in recipe.parts:
        own = [(model, models[index[model]]) for model in part.models]
        names = members.get(part.module or "")
        seen = [_restrict(checkpoint, names) for _, checkpoint in own]
        home = next((i for i, (model, _) in enumerate(own) if model == recipe.template), 0)
        try:
            here = recipe.template in part.models
            pieces.append(_whole(part, seen, home) if part.slice is None else _cut(part, own, seen, home, here))
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


def _restrict(model: Checkpoint, names: Mapping[str, None] | None) -> Checkpoint:
    """The model's tensors of a module."""
    return model if names is None else Selected(model, {name: name for name in model if name in names})


@dataclass(frozen=True, slots=True)
class _Stack:
    """The layers of a model that slices are of: what their names begin with, their number, and the tensors' places."""

    before: str
    count: int
    places: Mapping[str, Place]


def _whole(part: Part, seen: Sequence[Checkpoint], home: int) -> Piece:
    """The piece of whole models, or whole modules; home: the index of the template."""
    return Piece(part, tuple(seen), find_layers(seen[home]))


def _cut(
    part: Part, own: Sequence[tuple[Input, Checkpoint]], seen: Sequence[Checkpoint], home: int, here: bool
) -> Piece:
    """The layers of a slice in each model, under their numbers in the output. here: the template is one of them."""
    places = [find_places(model) for model in seen]
    if here and part.slice is not None and part.slice.of == 1 and all(map(_is_all, own, places)):
        return _whole(part, seen, home)
    views, layers, prefix = list[Checkpoint](), dict[str, Layer](), None
    for i, ((line, _), model) in enumerate(zip(own, seen, strict=True)):
        stack = _find_stack(model, places[i], line.label)
        names = dict(_names_in_slice(part, line, model, stack))
        views.append(Selected(model, names))
        if i == home:
            assert line.layers is not None
            assert part.slice is not None
            first, count = line.layers[0], part.slice.layers
            prefix = stack.before
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
    return tuple(Stacked(prefix, _count_of(template, prefix), tuple(own)) for prefix, own in layers.items())


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
        if not (stated_counts(models[i]) and stated_counts(models[j])):
            continue
        kinds, others = kinds_of(models[i].config, layer), kinds_of(models[j].config, theirs)
        for name in (name for name in kinds if name in others and kinds[name] != others[name]):
            yield (
                f"{part.place}: layer {layer} has {name} {kinds[name]!r}, and layer {theirs}, with which it is merged, "
                f"{others[name]!r}; choose layers of one kind"
            )


def _count_of(model: Checkpoint, prefix: str) -> int:
    """The number of a model's layers that the config is about, of those with a prefix."""
    count = max((place.count for place in find_places(model).values() if place.before == prefix), default=0)
    return max((number for number in stated_counts(model) if number < count), default=count)


def _is_all(line: tuple[Input, Checkpoint], places: Mapping[str, Place]) -> bool:
    """True if the layers of a line are all of one of its model's stacks."""
    counts = {place.count for place in places.values()} | set(stated_counts(line[1]))
    return line[0].layers is None or (line[0].layers[0] == 0 and line[0].layers[1] in counts)


def stated_counts(model: Checkpoint) -> list[int]:
    """The numbers of layers in a config."""
    return [stack.size for stack in config_stacks(model.config)]


def _find_stack(model: Checkpoint, places: Mapping[str, Place], label: str) -> _Stack:
    """The stack that a model's slices are of. Raises PlanError if there are several."""
    counts = {place.before: place.count for place in places.values() if not EXTRA.search(place.before)}
    if len(counts) != 1:
        found = ", ".join(f"{before} ({count})" for before, count in counts.items()) or "none"
        raise PlanError(
            f"slices need one stack of layers, {label} has {found}: "
            + ("name the parts of the model with `modules`, each with its slices" if counts else "use `models`")
        )
    ((before, count),) = counts.items()
    count = _count_of(model, before)  # layers behind those of the config predict further tokens
    inside = {name: place for name, place in places.items() if place.before == before and place.index < count}
    return _Stack(before, count, inside)


def _names_in_slice(part: Part, line: Input, model: Checkpoint, stack: _Stack) -> Iterator[tuple[str, str]]:
    """Of each tensor of a slice, its name in the output and in the model. Raises PlanError for layers it lacks."""
    assert part.slice is not None
    assert line.layers is not None
    first, last = line.layers
    if last > stack.count:
        raise PlanError(
            f"{line.place}.layer_range: found {list(line.layers)}, {line.label} has {stack.count} layers: 0 to "
            f"{stack.count - 1}; expected a range within [0, {stack.count}]"
        )
    early = _before_layers(model, stack)
    for name in model:
        place = stack.places.get(name)
        if place is not None:
            if first <= place.index < last:
                yield place.named(part.slice.start + place.index - first), name
        elif name.startswith(stack.before) and name not in early and _is_layer(name, stack):
            continue
        elif part.slice.index == 0 if name in early else part.slice.index == part.slice.of - 1:
            yield name, name


def _is_layer(name: str, stack: _Stack) -> bool:
    """True for a tensor in a layer beyond those of the config."""
    return name[len(stack.before) :].partition(".")[0].isdecimal()


def _before_layers(model: Checkpoint, stack: _Stack) -> set[str]:
    """The tensors outside of the layers that come before them, and those that the config ties to one of them."""
    outside = [name for name in model if name not in stack.places]
    early = {name for name in outside if BEFORE.search(name) and not AFTER.search(name)}
    groups = tied_names(outside) if is_tied(model.config) else []
    return early | {name for group in groups if early & set(group) for name in group}


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
