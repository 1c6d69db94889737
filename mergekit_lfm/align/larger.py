"""Families of elements larger than those that a table allows, for every group."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from mergekit_lfm.align.elements import random_gains, random_order, random_query_key, random_rotation, random_scale
from mergekit_lfm.arch.table import Group, Heads, Part, Scale, Symmetries, Units
from mergekit_lfm.artifacts.transform import Element, Gain, HeadsElement, Transform, TransformInfo, UnitsElement

Place = tuple[str, int, int]  # a tensor, its axis, and the index of a part of that axis


@dataclass(frozen=True)
class ModelTensors:
    """A model's tensors, and its table."""

    tensors: Mapping[str, Tensor]
    symmetries: Symmetries

    def units(self, names: list[str]) -> dict[str, Units]:
        """The `Units` among these groups."""
        groups = ((name, self.symmetries.groups[name]) for name in names)
        return {name: group for name, group in groups if isinstance(group, Units)}

    def heads(self, names: list[str]) -> dict[str, Heads]:
        """The `Heads` among these groups."""
        groups = ((name, self.symmetries.groups[name]) for name in names)
        return {name: group for name, group in groups if isinstance(group, Heads)}

    def transform(
        self,
        elements: Mapping[str, Element],
        symmetries: Symmetries | None = None,
        gains: Mapping[str, Gain] = MappingProxyType({}),
    ) -> Transform:
        """A transform with these elements, under the model's table or another."""
        return Transform(symmetries or self.symmetries, elements, TransformInfo("random"), gains)


def places_of(symmetries: Symmetries, group: str, views: Collection[str] | None = None) -> list[Place]:
    """The places where a group acts, or acts in one of these views."""
    return [
        (tensor, axis, place)
        for tensor, axis in symmetries.uses(group)
        for place, part in enumerate(symmetries.tensors[tensor][axis])
        if part.group == group and (views is None or part.view in views)
    ]


def replace_parts(symmetries: Symmetries, parts: Mapping[Place, Part], groups: Mapping[str, Group]) -> Symmetries:
    """The table with these parts in place of its own, and with these additional groups."""
    tensors = dict(symmetries.tensors)
    for (tensor, i, place), part in parts.items():
        axes = [list(axis) for axis in tensors[tensor]]
        axes[i][place] = part
        tensors[tensor] = tuple(map(tuple, axes))
    return Symmetries({**symmetries.groups, **groups}, tensors)


# A scale outside a group's own. Without one nothing is known of the activation, which may then allow any ("nonzero").
_NO_SCALE: Mapping[Scale | None, Scale] = {None: "nonzero", "sign": "positive", "positive": "sign"}


def _other_scale(model: ModelTensors, names: list[str], draw: torch.Generator) -> Transform:
    others = {name: replace(group, scale=_NO_SCALE[group.scale]) for name, group in model.units(names).items()}
    return model.transform({name: UnitsElement(scale=random_scale(group, draw)) for name, group in others.items()})


def _scaled_order(model: ModelTensors, names: list[str], draw: torch.Generator) -> Transform:
    """Scale a gate together with its values, a convolution together with the norm behind it."""
    places = [place for name in names for place in places_of(model.symmetries, name, {"order"})]
    plain = {(t, i, place): replace(model.symmetries.tensors[t][i][place], view="") for t, i, place in places}
    elements = {name: UnitsElement(scale=random_scale(group, draw)) for name, group in model.units(names).items()}
    return model.transform(elements, replace_parts(model.symmetries, plain, {}))


def _any_rotation(model: ModelTensors, names: list[str], draw: torch.Generator) -> Transform:
    groups = model.units(names).items()
    elements = {name: UnitsElement(matrix=random_rotation(group.count, draw)) for name, group in groups}
    gains = [random_gains(model.tensors, model.symmetries, name, draw) for name in names]
    return model.transform(elements, gains={norm: gain for each in gains for norm, gain in each.items()})


def _order_inside(model: ModelTensors, names: list[str], draw: torch.Generator) -> Transform:
    elements = {}
    for name, group in model.heads(names).items():
        orders = [random_order(group.head_dim, draw) for _ in range(group.groups)]
        elements[name] = HeadsElement(query_key=torch.eye(group.head_dim, dtype=torch.float64)[torch.stack(orders)])
    return model.transform(elements)


def _phases(model: ModelTensors, names: list[str], draw: torch.Generator) -> Transform:
    matrices = {name: random_query_key(group, "phases", draw) for name, group in model.heads(names).items()}
    return model.transform({name: HeadsElement(query_key=matrix) for name, matrix in matrices.items()})


def _queries_across(model: ModelTensors, names: list[str], _: torch.Generator) -> Transform:
    return _shift(model, names, ("query", "output"), {name: g.head_dim for name, g in model.heads(names).items()})


def _keys_across(model: ModelTensors, names: list[str], _: torch.Generator) -> Transform:
    return _shift(model, names, ("query", "key"), dict.fromkeys(names, 1))


def _values_across(model: ModelTensors, names: list[str], _: torch.Generator) -> Transform:
    return _shift(model, names, ("value", "output"), dict.fromkeys(names, 1))


def _shift(model: ModelTensors, names: list[str], views: tuple[str, str], by: Mapping[str, int]) -> Transform:
    """A transform that shifts the units in these views by so many places, across the borders of heads or groups."""
    table, elements = model.symmetries, {}
    for name, group in model.heads(names).items():
        count, moved = group.size(views[0]), Part(f"{name}, shifted")
        elements[str(moved)] = UnitsElement(order=torch.arange(count).roll(-by[name]))
        table = replace_parts(table, dict.fromkeys(places_of(table, name, views), moved), {str(moved): Units(count)})
    return model.transform(elements, table)


@dataclass(frozen=True)
class Larger:
    """A family. than: True for a group whose own family is smaller; transform: a random element on similar groups."""

    family: str
    than: Callable[[Symmetries, str, Group], bool]
    transform: Callable[[ModelTensors, list[str], torch.Generator], Transform]


LARGER = (
    Larger(
        "factors that are not in the table",
        lambda _table, _name, group: isinstance(group, Units) and group.scale in _NO_SCALE,
        _other_scale,
    ),
    Larger(
        "factors on axes that follow the order only",
        lambda table, name, group: isinstance(group, Units) and bool(group.scale and places_of(table, name, {"order"})),
        _scaled_order,
    ),
    Larger(
        "any rotation",
        lambda table, name, group: (
            isinstance(group, Units) and group.rotation != "orthogonal" and bool(places_of(table, name, {"gain"}))
        ),
        _any_rotation,
    ),
    Larger(
        "order inside",
        lambda _table, _name, group: isinstance(group, Heads) and group.query_key != "linear" and group.head_dim > 1,
        _order_inside,
    ),
    Larger(
        "phases inside",
        lambda _table, _name, group: isinstance(group, Heads) and group.query_key == "signs",
        _phases,
    ),
    Larger(
        "query heads across groups",
        lambda _table, _name, group: isinstance(group, Heads) and group.groups > 1,
        _queries_across,
    ),
    Larger(
        "queries and keys across heads",
        lambda _table, _name, group: (
            isinstance(group, Heads) and group.groups > 1 == group.per_group and group.query_key == "linear"
        ),
        _keys_across,
    ),
    Larger(
        "values across heads",
        lambda _table, _name, group: isinstance(group, Heads) and group.groups > 1 == group.per_group,
        _values_across,
    ),
)
