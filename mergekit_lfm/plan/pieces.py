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


@dataclass(frozen=True, slots=True)
class _Stack:
    """The layers of a model that slices are of.

    places: of the tensors in them; layers: the names in each. early, late: the names in no layer that come before the
    layers, and the others. order: of all names in the model.
    """

    places: Mapping[str, Place]
    layers: Sequence[Sequence[str]]
    early: Sequence[str]
    late: Sequence[str]
    order: Mapping[str, int]


class _Sight:
    """The models as the modules see them. A model is looked at once for all of its slices. members: by module."""

    def __init__(self, models: Mapping[Input, Checkpoint], members: Mapping[str, Mapping[str, None]]) -> None:
        self._models, self._members = models, members
        self._seen = dict[tuple[Input, str | None], Checkpoint]()
        self._stacks = dict[tuple[Input, str | None], _Stack]()

    def see(self, model: Input, module: str | None) -> Checkpoint:
        """The model's tensors of a module; all of them for None."""
        if (model, module) not in self._seen:
            checkpoint, names = self._models[model], self._members.get(module or "")
            inside = None if names is None else {name: name for name in checkpoint if name in names}
            self._seen[model, module] = checkpoint if inside is None else Selected(checkpoint, inside)
        return self._seen[model, module]

    def stack(self, model: Input, module: str | None) -> _Stack:
        """The layers of the model in a module. Raises PlanError if there are several stacks."""
        if (model, module) not in self._stacks:
            self._stacks[model, module] = _find_stack(self.see(model, module), model.label)
        return self._stacks[model, module]


def _cut(part: Part, sight: _Sight, home: Input, template: Input) -> Piece:
    """A part with its tensors; those in layers of a slice have their numbers in the output. home: names the tensors."""
    seen = {model: sight.see(model, part.module) for model in part.models}
    if part.slice is None:
        return Piece(part, tuple(seen.values()), find_layers(seen[home]))
    if part.slice.of == 1 and all(_is_all(model, checkpoint) for model, checkpoint in seen.items()):
        return Piece(part, tuple(seen.values()), find_layers(seen[home]))
    views, layers = list[Checkpoint](), dict[str, Layer]()
    for line, model in seen.items():
        stack = sight.stack(line, part.module)
        names = dict(_names_in_slice(part, line, stack))
        if part.slice.index == part.slice.of - 1:
            names |= _heads_of(model, sight.see(template, part.module))
        views.append(Selected(model, names))
        if line == home:
            assert line.layers is not None
            first, count = line.layers[0], part.slice.layers
            layers = {
                new: (stack.places[old].index - first, count) for new, old in names.items() if old in stack.places
            }
    return Piece(part, tuple(views), layers)


def _is_all(line: Input, model: Checkpoint) -> bool:
    """True if the layers of a line are all of one of its model's stacks."""
    counts = {place.count for place in find_places(model).values()} | set(_stated_counts(model))
    return line.layers is None or (line.layers[0] == 0 and line.layers[1] in counts)


def _stated_counts(model: Checkpoint) -> Iterator[int]:
    """The numbers of layers in a config."""
    text = model.config.get("text_config")
    for config in (model.config, text if isinstance(text, Mapping) else {}):
        yield from (config[key] for key in LAYER_COUNTS if type(config.get(key)) is int)


def _find_stack(model: Checkpoint, label: str) -> _Stack:
    """The stack that a model's slices are of. Raises PlanError if there are several."""
    places = find_places(model)
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
    layers: list[list[str]] = [[] for _ in range(count)]
    for name, place in inside.items():
        layers[place.index].append(name)
    outside = [name for name in model if name not in inside]
    early = _before_layers(outside, model)
    late = [name for name in outside if name not in early and not _is_layer(name, before)]
    order = {name: i for i, name in enumerate(model)}
    return _Stack(inside, layers, [name for name in outside if name in early], late, order)


def _names_in_slice(part: Part, line: Input, stack: _Stack) -> Iterator[tuple[str, str]]:
    """Of each tensor of a slice, its name in the output and in the model. Raises PlanError for layers it lacks."""
    assert part.slice is not None
    assert line.layers is not None
    (first, last), count = line.layers, len(stack.layers)
    if last > count:
        raise PlanError(
            f"{line.place}.layer_range: found {list(line.layers)}, {line.label} has {count} layers: 0 to "
            f"{count - 1}; expected a range within [0, {count}]"
        )
    names = [name for layer in stack.layers[first:last] for name in layer]
    names += stack.early if part.slice.index == 0 else ()
    names += stack.late if part.slice.index == part.slice.of - 1 else ()
    for name in sorted(names, key=stack.order.__getitem__):
        place = stack.places.get(name)
        yield name if place is None else place.named(part.slice.start + place.index - first), name


def _is_layer(name: str, before: str) -> bool:
    """True for a tensor in a layer beyond those of the config."""
    return name.startswith(before) and name[len(before) :].partition(".")[0].isdecimal()


def _before_layers(outside: Sequence[str], model: Checkpoint) -> set[str]:
    """The tensors outside of the layers that come before them, and those that the config ties to one of them."""
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
