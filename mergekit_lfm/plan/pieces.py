"""What each part of a recipe sees of its models: all tensors, those of a module, or some layers under new numbers.

No table says which tensors exist. Layers are found in the names, per prefix; what is in no layer belongs to the first
slice if it is before the layers (embeddings), else to the last (norms, heads).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

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
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
EXTRA = re.compile(r"(^|\.)mtp\.")  # layers that predict further tokens, beside the stack


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a recipe, its models as it sees them, and the layers of its tensors: index and count."""

    part: Part
    models: tuple[Checkpoint, ...]
    layers: Mapping[str, Layer]


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
            views, layers = _cut(part, own, seen, home, _restrict(template, names))
        except PlanError as error:
            problems.append(str(error))
            continue
        pieces.append(Piece(part, tuple(views), layers))
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


def _cut(
    part: Part, own: Sequence[tuple[Input, Checkpoint]], seen: Sequence[Checkpoint], home: int, template: Checkpoint
) -> tuple[Sequence[Checkpoint], Mapping[str, Layer]]:
    """What a part sees of its models, of a slice its layers under their numbers in the output; and the layers there.

    template: as the part sees it.
    """
    if part.slice is None:
        return seen, find_layers(seen[home])
    places = [find_places(model) for model in seen]
    if part.slice.of == 1 and all(map(_is_all, own, places)):
        return seen, {name: place.layer for name, place in places[home].items()}
    views, layers = list[Checkpoint](), dict[str, Layer]()
    for i, ((line, _), model) in enumerate(zip(own, seen, strict=True)):
        stack = _find_stack(model, places[i], line.label)
        names = dict(_names_in_slice(part, line, model, stack))
        if part.slice.index == part.slice.of - 1:
            names |= _heads_of(model, template)
        views.append(Selected(model, names))
        if i == home:
            assert line.layers is not None
            first, count = line.layers[0], part.slice.layers
            layers = {
                new: (stack.places[old].index - first, count) for new, old in names.items() if old in stack.places
            }
    return views, layers


def _is_all(line: tuple[Input, Checkpoint], places: Mapping[str, Place]) -> bool:
    """True if the layers of a line are all of one of its model's stacks."""
    counts = {place.count for place in places.values()} | set(_stated_counts(line[1]))
    return line[0].layers is None or (line[0].layers[0] == 0 and line[0].layers[1] in counts)


def _stated_counts(model: Checkpoint) -> Iterator[int]:
    """The numbers of layers in a config."""
    text = model.config.get("text_config")
    for config in (model.config, text if isinstance(text, Mapping) else {}):
        yield from (config[key] for key in LAYER_COUNTS if type(config.get(key)) is int)


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
    stated = [number for number in _stated_counts(model) if number < count]
    count = max(stated, default=count)  # layers behind those of the config predict further tokens
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


def _heads_of(model: Checkpoint, template: Checkpoint) -> dict[str, str]:
    """The embedding of a tied model under the name of the head that an untied template has apart from its own."""
    if is_tied(template.config) is not False or not is_tied(model.config):
        return {}
    groups = tied_names([*template, *(name for name in model if name not in template)])
    pairs = ((name, [own for own in group if own in model]) for group in groups for name in group)
    return {name: own[0] for name, own in pairs if own and name in template and AFTER.search(name)}


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
