"""What an architecture is to alignment: which axes of which tensors move together when hidden units are rewritten.

A table is text: for each tensor its name in the file and one word for each axis. A word names the group that acts on
the axis, and how. `ffn.0` is moved as a vector of hidden units is; `ffn.0'` as what reads such vectors, by the inverse
transposed; `ffn.0:order` follows the order of the units only. Words without a group (`vocab`, `class`, ...) are free.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.tensors import TensorSpec

# Words for axes on which nothing acts.
FREE = frozenset({"vocab", "position", "type", "class", "input", "kernel", "within_head"})
UNIT_VIEWS = ("", "'", "order", "gain", "shift")
HEAD_VIEWS = ("query", "key", "value", "output")

Scale = Literal["sign", "positive", "nonzero"]
QueryKey = Literal["linear", "phases", "signs", "fixed"]


@dataclass(frozen=True, slots=True)
class Units:
    """Hidden units that may stand in any order.

    scale: the factors by which each unit may be multiplied where it is written and divided where it is read, none with
    None: "positive" through a ReLU, "sign" on a residual with RMSNorm, "nonzero" (any sign) on the linear half of a
    gated layer. rotation: the matrices that may act on all units at once when the gains of the norms are folded into
    what reads them: "orthogonal" with RMSNorm, "centred" (orthogonal, and keeping the vector of ones) with LayerNorm.
    """

    count: int
    scale: Scale | None = None
    rotation: Literal["orthogonal", "centred"] | None = None


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads: `groups` key and value heads of `head_dim`, each read by `per_group` query heads.

    Groups may stand in any order, and query heads within their group. query_key: what may act within a head on keys,
    with its inverse transposed on the queries: "linear" any invertible matrix (no rotary positions); "phases" for each
    pair (i, i + head_dim / 2) of rotary positions a rotation and a factor; "signs" for each such pair a sign (rotary
    positions, and norms of queries and keys); "fixed" nothing, where positions are rotary in other pairs and so allow
    what has no name here. On values any invertible matrix acts, on the output's columns its inverse transposed.
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
    """What acts on an axis, or on a run of it: a group in one of its views; or nothing, with group None.

    norm: for what reads the output of a norm, and for the norm's own gain and shift, the norm.
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
    """The groups of a model and, for every tensor by its name in the file, what acts on each of its axes."""

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
        """How many entries of an axis of `size` each of its parts takes."""
        parts = self.tensors[tensor][axis]
        return [size] if len(parts) == 1 else [part_size(self.groups, part) for part in parts]


def part_size(groups: Mapping[str, Group], part: Part) -> int:
    """The units of a part; an axis may have several entries for each, as after flattening an image."""
    group = groups[part.group or ""]
    return group.count if isinstance(group, Units) else group.size(part.view)


def read_table(
    text: str, groups: Mapping[str, Group], present: Iterable[str], repeat: Mapping[str, int] | None = None
) -> Symmetries:
    """The symmetries in a table of lines `NAME AXIS AXIS ...`; a norm's scalars have a name alone.

    A line with {l} stands for as many as `repeat` says of l. A name that ends with "?" is left out where `present`, the
    names in the checkpoint, lacks it. Parts that lie one after another on an axis are divided by "|".
    """
    names = set(present)
    tensors: dict[str, tuple[Axis, ...]] = {}
    for line in (line.split() for line in text.splitlines() if line.strip()):
        for name, *words in _repeated(line, repeat or {}):
            if name.endswith("?") and name[:-1] not in names:
                continue
            tensors[name.removesuffix("?")] = tuple(read_axis(word, groups) for word in words)
    return Symmetries(groups, tensors)


def prefixed(table: str, prefix: str, present: Iterable[str]) -> str:
    """The table with a prefix before each name, unless none of the names in the checkpoint has it."""
    found = any(name.startswith(prefix) for name in present)
    return re.sub(r"^(?=\S)", prefix, table, flags=re.MULTILINE) if found else table


def _repeated(line: list[str], repeat: Mapping[str, int]) -> Iterable[list[str]]:
    for letter, count in repeat.items():
        if f"{{{letter}}}" in line[0]:
            return ([word.replace(f"{{{letter}}}", str(i)) for word in line] for i in range(count))
    return [line]


def read_axis(word: str, groups: Mapping[str, Group]) -> Axis:
    """The parts of one word of a table. PlanError where it names no group and no free axis."""
    return tuple(_read_part(part, groups) for part in word.split("|"))


def _read_part(word: str, groups: Mapping[str, Group]) -> Part:
    if word in FREE:
        return Part(None, free=word)
    place, _, norm = word.partition("@")
    name, _, view = place.partition(":")
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
        raise PlanError(f"the table's {word!r} has no known view; expected one of {', '.join(filter(None, views))}")
    return Part(name, view, norm or None)


def check_fit(symmetries: Symmetries, specs: Mapping[str, TensorSpec], label: object) -> None:
    """PlanError about all tensors that the table does not name, or that do not fit it."""
    problems = [f"{specs[name]} is not in the table" for name in specs if name not in symmetries.tensors]
    problems += [f"{name} is in the table, and missing" for name in symmetries.tensors if name not in specs]
    for name, axes in symmetries.tensors.items():
        if name in specs:
            problems += _misfits(symmetries, specs[name], axes)
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise PlanError(
            f"{label} does not fit the symmetry table of its architecture:\n  "
            + "\n  ".join(shown)
            + "\nEvery tensor has to be named there, with its axes: give a table that does, or another model"
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
    """The same table with these groups left out, and the axes on which they acted free."""
    return Symmetries(
        {name: group for name, group in symmetries.groups.items() if name not in outputs},
        {
            tensor: tuple(tuple(_OUTPUT if part.group in outputs else part for part in axis) for axis in axes)
            for tensor, axes in symmetries.tensors.items()
        },
    )
