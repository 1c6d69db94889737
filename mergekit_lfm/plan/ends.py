"""The ends of a stack: tensors that only its first or its last layer has, or that only this one lacks.

The first block of T5 has a bias for all blocks, the first layer of ModernBERT lacks a norm. Such a tensor belongs to
the place and not to the layer. Only layers of one kind are compared, three or more: of two, both could be the rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_lfm.arch.layer_facts import facts_of, model_of, part_at, stacks_of
from mergekit_lfm.errors import PlanError
from mergekit_lfm.plan.layers import Place
from mergekit_lfm.recipe.parts import Input, Slice


@dataclass(frozen=True, slots=True)
class End:
    """The first or the last layer: its index; by what their names end with, the tensors that it alone has or lacks."""

    index: int
    own: frozenset[str] = frozenset()
    lacking: frozenset[str] = frozenset()


def find_ends(config: Mapping[str, Any], places: Mapping[str, Place], before: str, count: int) -> tuple[End, End]:
    """The first and the last layer of a stack of `count` layers. before: what their names begin with.

    They are as the others if the config does not say which layers are of one kind.
    """
    layers: dict[int, set[str]] = {i: set() for i in range(count)}
    for place in places.values():
        layers[place.index].add(place.behind)
    kinds = list(_kinds(config, before, count))
    first, last = (_end(layers, kinds, index) for index in (0, count - 1))
    return first, last


def _kinds(config: Mapping[str, Any], before: str, count: int) -> Iterator[list[Any]]:
    """The facts of each layer in a config; nothing if it describes no such stack."""
    parts = [(part_at(config, path) or {}, model_of(config, path)) for path, *_ in stacks_of(config, None, before)]
    facts = [fact.values for part, model in parts for fact in facts_of(part, model, count).values()]
    for layer in range(count) if parts else ():
        yield [values[layer] for values in facts if len(values) == count]


def _end(layers: Mapping[int, set[str]], kinds: Sequence[list[Any]], index: int) -> End:
    peers = [layers[i] for i, kind in enumerate(kinds) if i != index and kind == kinds[index]]
    if len(peers) < 2:
        return End(index)
    others = set().union(*(names for i, names in layers.items() if i != index))
    return End(index, frozenset(layers[index] - others), frozenset(set.intersection(*peers) - layers[index]))


def names_at_ends(ends: tuple[End, End], places: Mapping[str, Place], slice: Slice) -> Iterator[tuple[str, str]]:
    """Of each tensor that only an end has, its name in the output and in the model, if the slice has that end."""
    for end, index in zip(ends, _outer(slice), strict=True):
        for name, place in places.items() if index is not None else ():
            if place.index == end.index and place.behind in end.own:
                yield place.named(slice.start + (index or 0)), name


def refuse_moved_ends(ends: tuple[End, End], line: Input, slice: Slice) -> None:
    """Raise PlanError if a layer that lacks a tensor as the first or the last one comes elsewhere in the output.

    Nor may another layer take its place there.
    """
    assert line.layers is not None
    for end, index, word in zip(ends, _outer(slice), ("first", "last"), strict=True):
        moved = [at for at, layer in enumerate(range(*line.layers)) if (layer == end.index) != (at == index)]
        if end.lacking and moved:
            raise PlanError(
                f"{line.place}.layer_range: found {list(line.layers)}, but layer {end.index} of {line.label}, the "
                f"{word}, has no {min(end.lacking).lstrip('.')}, which other layers of its kind have: expected it as "
                f"the {word} one of the stack, and nowhere else"
            )


def _outer(slice: Slice) -> tuple[int | None, int | None]:
    """The layers in a slice that are the first and the last of the stack; None for one that another slice has."""
    return 0 if slice.index == 0 else None, slice.layers - 1 if slice.index == slice.of - 1 else None
