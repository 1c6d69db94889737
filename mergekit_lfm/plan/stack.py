"""The stack of layers in a model, as slices take it apart.

No table says which tensors exist. Layers are found in the names; a tensor in no layer belongs to the first slice if it
is before the layers (embeddings), else to the last (norms, heads).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergekit_lfm.arch.layer_facts import stacks_of
from mergekit_lfm.arch.ties import is_tied, tied_names
from mergekit_lfm.errors import PlanError
from mergekit_lfm.plan.ends import End, find_ends, names_at_ends, refuse_moved_ends
from mergekit_lfm.plan.layers import Place, find_places
from mergekit_lfm.recipe.parts import Input, Slice
from mergekit_lfm.store.checkpoint import Checkpoint

BEFORE = re.compile(
    r"(^|[._])(w[tp]e|shared|\w*embed\w*|\w*patch\w*|conv\w*|stem|position\w*|tok_\w+|relative_\w+)([._]|$)"
)
AFTER = re.compile(r"(^|\.)(embed_out|lm_heads?|output|predictions)\.")
EXTRA = re.compile(r"(^|\.)mtp\.")  # layers that predict further tokens, beside the stack


@dataclass(frozen=True, slots=True)
class Stack:
    """The layers of a model that slices are of.

    prefix: the beginning of their names. places: of the tensors in them; layers: the names in each. early, late: the
    names in no layer that come before the layers, and the others. order: of all names in the model. ends: the first
    and the last layer.
    """

    prefix: str
    places: Mapping[str, Place]
    layers: Sequence[Sequence[str]]
    early: Sequence[str]
    late: Sequence[str]
    order: Mapping[str, int]
    ends: tuple[End, End]


def find_stack(model: Checkpoint, label: str) -> Stack:
    """The stack that a model's slices are of: not embeddings or heads. Raises PlanError if there are several."""
    places = find_places(model)
    counts = {place.before: place.count for place in places.values() if not EXTRA.search(place.before)}
    beside = {before for before in counts if BEFORE.search(before) or AFTER.search(before)}
    counts = {before: count for before, count in counts.items() if before not in beside} or counts
    if len(counts) != 1:
        found = ", ".join(f"{before} ({count})" for before, count in counts.items()) or "none"
        raise PlanError(
            f"slices need one stack of layers, {label} has {found}: "
            + ("name the parts of the model with `modules`, each with its slices" if counts else "use `models`")
        )
    (prefix,) = counts
    count = count_layers(model, prefix)  # layers behind those of the config predict further tokens
    inside = {name: place for name, place in places.items() if place.before == prefix and place.index < count}
    layers: list[list[str]] = [[] for _ in range(count)]
    for name, place in inside.items():
        layers[place.index].append(name)
    outside = [name for name in model if name not in inside]
    early = _before_layers(outside, model)
    late = [name for name in outside if name not in early and not _is_layer(name, prefix)]
    return Stack(
        prefix,
        inside,
        layers,
        [name for name in outside if name in early],
        late,
        {name: i for i, name in enumerate(model)},
        find_ends(model.config, inside, prefix, count),
    )


def count_layers(model: Checkpoint, prefix: str) -> int:
    """The number of a model's layers that the config is about, of those with a prefix."""
    count = max((place.count for place in find_places(model).values() if place.before == prefix), default=0)
    stated = [stack.size for stack in stacks_of(model.config, None, prefix)]
    return max((number for number in stated if number < count), default=count)


def is_all(line: Input, model: Checkpoint) -> bool:
    """True if the layers of a line are all of one of its model's stacks."""
    if line.layers is None:
        return True
    first, last = line.layers
    counts = {place.count for place in find_places(model).values()}
    return first == 0 and (last in counts or bool(stacks_of(model.config, last)))


def names_in_slice(piece: Slice, line: Input, stack: Stack) -> Iterator[tuple[str, str]]:
    """Of each tensor of a slice, its name in the output and in the model. Raises PlanError for layers it lacks."""
    assert line.layers is not None
    (first, last), count = line.layers, len(stack.layers)
    if last > count:
        raise PlanError(
            f"{line.place}.layer_range: found {list(line.layers)}, {line.label} has {count} layers: 0 to "
            f"{count - 1}; expected a range within [0, {count}]"
        )
    refuse_moved_ends(stack.ends, line, piece)
    yield from names_at_ends(stack.ends, stack.places, piece)
    own = stack.ends[0].own | stack.ends[1].own
    names = [name for layer in stack.layers[first:last] for name in layer if stack.places[name].behind not in own]
    names += stack.early if piece.index == 0 else ()
    names += stack.late if piece.index == piece.of - 1 else ()
    for name in sorted(names, key=stack.order.__getitem__):
        place = stack.places.get(name)
        yield name if place is None else place.named(piece.start + place.index - first), name


def heads_of(model: Checkpoint, template: Checkpoint) -> dict[str, str]:
    """The embedding of a tied model under the name of the head that an untied template has apart from its own."""
    if is_tied(template.config) is not False or not is_tied(model.config):
        return {}
    groups = tied_names([*template, *(name for name in model if name not in template)])
    pairs = ((name, [own for own in group if own in model]) for group in groups for name in group)
    return {name: own[0] for name, own in pairs if own and name in template and AFTER.search(name)}


def _is_layer(name: str, prefix: str) -> bool:
    """True for a tensor in a layer beyond those of the config."""
    return name.startswith(prefix) and name[len(prefix) :].partition(".")[0].isdecimal()


def _before_layers(outside: Sequence[str], model: Checkpoint) -> set[str]:
    """The tensors outside of the layers that come before them, and those that the config ties to one of them."""
    early = {name for name in outside if BEFORE.search(name) and not AFTER.search(name)}
    groups = tied_names(outside) if is_tied(model.config) else []
    return early | {name for group in groups if early & set(group) for name in group}
