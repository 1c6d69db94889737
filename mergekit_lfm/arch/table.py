"""Symmetry tables: the axes of an architecture's tensors that move together when hidden units are rewritten.

A table is text: for each tensor its name in the file and one word for each axis. A word names the group that acts on
the axis, and how. `ffn.0` transforms like a vector of hidden units; `ffn.0'` like a reader of such vectors, by the
inverse transposed; `ffn.0:order` follows the order of the units only. Words without a group (`vocab`, `class`, ...)
are free.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.tensors import TensorSpec

# Words for axes on which no group acts.
FREE = frozenset({"vocab", "position", "type", "class", "input", "kernel", "within_head"})
UNIT_VIEWS = ("", "'", "order", "gain", "shift")
HEAD_VIEWS = ("query", "key", "value", "output")

Scale = Literal["sign", "positive", "nonzero"]
QueryKey = Literal["linear", "phases", "signs", "fixed"]


@dataclass(frozen=True, slots=True)
class Units:
    """Hidden units that may stand in any order.

    scale: factors that may multiply each unit where it is written and divide it where it is read: "positive" through a
    ReLU, "sign" on a residual with RMSNorm, "nonzero" (any sign) on the linear half of a gated layer; None for no
    factors. rotation: matrices that may act on all units at once after the gains of the norms are folded into their
    readers: "orthogonal" with RMSNorm, "centred" (orthogonal, and keeping the vector of ones) with LayerNorm.
    """

    count: int
    scale: Scale | None = None
    rotation: Literal["orthogonal", "centred"] | None = None


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads: `groups` key and value heads of `head_dim`, each read by `per_group` query heads.

    Groups may stand in any order, and query heads in any order within their group. query_key: the matrices that may
    act on keys within a head, with their inverse transposed on the queries: "linear" any invertible matrix (no rotary
    positions); "phases" a rotation and a factor for each pair (i, i + head_dim / 2) of rotary positions; "signs" a sign
    for each such pair (rotary positions, and norms of queries and keys); "fixed" none, for rotary positions in other
    pairs, whose matrices have no name here. Any invertible matrix may act on values, with its inverse transposed on the
    output's columns.
    """

    groups: int
    per_group: int
    head_dim: int
    query_key: QueryKey

    def size(self, view: str) -> int:
        """The length of an axis in one of the HEAD_VIEWS."""
        return self.groups * self.head_dim * (self.per_group if view in ("query", "output") else 1)


Group = Units | Heads


@dataclass(frozen=True, slots=True)
class Part:
    """An axis, or a run of it, with the group and view that act there; a free axis has no group.

    norm: the norm whose output the axis reads, or whose gain or shift it is.
    """

    group: str | None
    view: str = ""
    norm: str | None = None
    free: str = ""

    def __str__(self) -> str:
        if self.group is None:
            return self.free
        view = self.view if self.view in ("", "'") else f":{self.view}"
        return self.group + view + (f"@{self.norm}" if self.norm else "")


Axis = tuple[Part, ...]  # one part, or several that lie one after another


@dataclass(frozen=True)
class Symmetries:
    """The groups of a model and, for every tensor by its name in the file, its axes."""

    groups: Mapping[str, Group]
    tensors: Mapping[str, tuple[Axis, ...]]

    def uses(self, group: str) -> list[tuple[str, int]]:
        """(tensor, axis) of every axis on which the group acts, in the table's order."""
        return [
            (name, i)
            for name, axes in self.tensors.items()
            for i, axis in enumerate(axes)
            if any(part.group == group for part in axis)
        ]

    def lengths(self, tensor: str, axis: int, size: int) -> list[int]:
        """The number of entries of each part of an axis of `size`."""
        parts = self.tensors[tensor][axis]
        return [size] if len(parts) == 1 else [part_size(self.groups, part) for part in parts]


def part_size(groups: Mapping[str, Group], part: Part) -> int:
    """The number of units of a part; an axis may have several entries per unit, as after flattening an image."""
    group = groups[part.group or ""]
    return group.count if isinstance(group, Units) else group.size(part.view)


def read_table(
    text: str, groups: Mapping[str, Group], present: Iterable[str], repeat: Mapping[str, int] | None = None
) -> Symmetries:
    """Read a table of lines `NAME AXIS AXIS ...`; a scalar's line has only a name.

    A line with {l} is repeated for l from 0 to `repeat["l"]` - 1. A name that ends with "?" is left out
    if `present`, the names in the checkpoint, lacks it. "|" divides parts that lie one after another on an axis.
    """
    names = set(present)
    tensors: dict[str, tuple[Axis, ...]] = {}
    for line in (line.split() for line in text.splitlines() if line.strip()):
        for name, *words in _repeat(line, repeat or {}):
            if name.endswith("?") and name[:-1] not in names:
                continue
            tensors[name.removesuffix("?")] = tuple(read_axis(word, groups) for word in words)
    return Symmetries(groups, tensors)


def add_prefix(table: str, prefix: str, present: Iterable[str]) -> str:
    """The table with a prefix before each name if any name in the checkpoint has it."""
    used = any(name.startswith(prefix) for name in present)
    return re.sub(r"^(?=\S)", prefix, table, flags=re.MULTILINE) if used else table


def _repeat(line: list[str], repeat: Mapping[str, int]) -> Iterable[list[str]]:
    for letter, count in repeat.items():
        if f"{{{letter}}}" in line[0]:
            return ([word.replace(f"{{{letter}}}", str(i)) for word in line] for i in range(count))
    return [line]


def read_axis(word: str, groups: Mapping[str, Group]) -> Axis:
    """The parts of one word of a table. Raises PlanError if it names neither a group nor a free axis."""
    return tuple(_read_part(part, groups) for part in word.split("|"))


def _read_part(word: str, groups: Mapping[str, Group]) -> Part:
    if word in FREE:
        return Part(None, free=word)
    acting, _, norm = word.partition("@")
    name, _, view = acting.partition(":")
    if name.endswith("'"):
        name, view = name[:-1], "'"
    group = groups.get(name)
    if group is None:
        raise PlanError(
            f"the table's {word!r} is neither a group nor a free axis; groups are {', '.join(groups)}, free axes "
            f"{', '.join(sorted(FREE))}. Declare the group, or correct the word"
        )
    views = UNIT_VIEWS if isinstance(group, Units) else HEAD_VIEWS
    if view not in views or (view in ("gain", "shift") and not norm):
        raise PlanError(f"the table's {word!r} has an unknown view; expected one of {', '.join(filter(None, views))}")
    return Part(name, view, norm or None)


def check_fit(symmetries: Symmetries, specs: Mapping[str, TensorSpec], label: object) -> None:
    """Raises PlanError with all tensors that are missing, absent from the table, or of another shape."""
    problems = [f"{specs[name]} is not in the table" for name in specs if name not in symmetries.tensors]
    problems += [f"{name} is in the table, but missing" for name in symmetries.tensors if name not in specs]
    for name, axes in symmetries.tensors.items():
        if name in specs:
            problems += _misfits(symmetries, specs[name], axes)
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise PlanError(
            f"{label} does not fit the symmetry table of its architecture:\n  "
            + "\n  ".join(shown)
            + "\nThe table must name every tensor with its axes: give a table that does, or another model"
        )


def _misfits(symmetries: Symmetries, spec: TensorSpec, axes: tuple[Axis, ...]) -> list[str]:
    if len(axes) != len(spec.shape):
        return [f"{spec} has {len(spec.shape)} axes, the table names {len(axes)}"]
    problems = []
    for size, axis in zip(spec.shape, axes, strict=True):
        if all(part.group is None for part in axis):
            continue
        units = sum(part_size(symmetries.groups, part) for part in axis)
        whole = size % units == 0 if len(axis) == 1 else size == units
        if not whole or (isinstance(symmetries.groups[axis[0].group or ""], Heads) and size != units):
            word = "|".join(map(str, axis))
            problems.append(f"{spec}: {word} has {units} units, the axis {size} entries")
    return problems


_OUTPUT = Part(None, free="class")


def keep_outputs(symmetries: Symmetries, outputs: Collection[str]) -> Symmetries:
    """The same table without these groups, with the axes on which they acted free."""
    return Symmetries(
        {name: group for name, group in symmetries.groups.items() if name not in outputs},
        {
            tensor: tuple(tuple(_OUTPUT if part.group in outputs else part for part in axis) for axis in axes)
            for tensor, axes in symmetries.tensors.items()
        },
    )
