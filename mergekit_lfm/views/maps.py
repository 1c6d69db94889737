"""A transform's effect along each axis of a tensor, as indices, blocks and factors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mergekit_lfm.arch.table import HEAD_VIEWS, Heads, Part
from mergekit_lfm.artifacts.transform import HeadsElement, Transform, UnitsElement

CPU = torch.device("cpu")

NARROW = 1024  # rows that one block may mix before the whole tensor is rewritten at once


@dataclass(frozen=True)
class Map:
    """A transform's effect along a run of an axis: new = after * (blocks @ (before * old[index])).

    index: int64 [n], of fewer than the old entries where units are left out; blocks: [k, out, in] on the diagonal;
    before [n] and after [m]; None leaves that step out. values: [n] that replace all of it. All but the index have the
    dtype of the arithmetic.
    """

    index: Tensor | None = None
    blocks: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None
    values: Tensor | None = None

    @property
    def exact(self) -> bool:
        """True if entries only change places."""
        return self.blocks is None and self.before is None and self.after is None and self.values is None

    @property
    def block(self) -> tuple[int, int]:
        """(new units, old units) that are mixed with one another."""
        return (1, 1) if self.blocks is None else (self.blocks.shape[1], self.blocks.shape[2])


IDENTITY = Map()

Arithmetic = Literal["float32", "float64"]


class Maps:
    """A transform's maps along every part of its table, each made once: matrices are large, and tensors share them.

    device: that of the maps, and of the tensors that they rewrite.
    """

    def __init__(self, transform: Transform, device: torch.device = CPU) -> None:
        self.transform, self.device = transform, device
        self._made: dict[tuple[Part, Arithmetic], Map] = {}
        self._blocks: dict[tuple[str | None, str, Arithmetic], Tensor] = {}

    def of(self, part: Part, arithmetic: Arithmetic) -> Map:
        """The map of a part, in float32 or float64."""
        key = part, arithmetic
        if key not in self._made:
            self._made[key] = self._cast(map_of(self.transform, part), part, arithmetic)
        return self._made[key]

    def _cast(self, original: Map, part: Part, arithmetic: Arithmetic) -> Map:
        device, dtype = self.device, getattr(torch, arithmetic)
        wide = ("before", "after", "values")
        cast = {name: x.to(device, dtype) for name in wide if (x := getattr(original, name)) is not None}
        if original.index is not None:
            cast["index"] = original.index.to(device)
        if original.blocks is not None:  # the same for all norms of a group
            shared = part.group, part.view, arithmetic
            cast["blocks"] = self._blocks.setdefault(shared, original.blocks.to(device, dtype))
        return replace(original, **cast) if cast else original

    @property
    def nbytes(self) -> int:
        """Bytes of the transform and of all maps made so far."""
        tensors = [x for element in self.transform.elements.values() for x in vars(element).values() if x is not None]
        tensors += [x for way in self._made.values() for x in vars(way).values() if x is not None]
        return sum({x.data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def map_of(transform: Transform, part: Part) -> Map:
    """The transform's map along a part of an axis."""
    element = transform.elements.get(part.group or "")
    if isinstance(element, HeadsElement):
        group = transform.symmetries.groups[part.group or ""]
        assert isinstance(group, Heads)
        return _map_of_heads(group, element, part.view)
    return IDENTITY if element is None else _map_of_units(element, part, transform)


def _map_of_units(element: UnitsElement, part: Part, transform: Transform) -> Map:
    dual = part.view == "'"
    if element.matrix is None:
        if element.scale is None or part.view not in ("", "'"):
            return Map(element.order)
        return Map(element.order, after=1 / element.scale if dual else element.scale)
    gain = transform.gains.get(part.norm or "")
    matrix = element.dual if dual and element.dual is not None else element.matrix
    blocks = matrix.double()[None]
    if gain is None:
        return Map(blocks=blocks)
    if part.view == "gain":
        return Map(values=gain.new)
    if part.view == "shift":
        return Map(blocks=blocks, before=1 / gain.old, after=gain.new)
    return Map(blocks=blocks, before=gain.old, after=1 / gain.new)


def _map_of_heads(group: Heads, element: HeadsElement, view: str) -> Map:
    of_queries = view in ("query", "output")
    order = torch.arange(group.groups) if element.groups is None else element.groups
    if of_queries:
        inside = torch.arange(group.per_group).expand(group.groups, -1) if element.queries is None else element.queries
        order = (order[:, None] * group.per_group + inside).flatten()
    index = order[:, None] * group.head_dim + torch.arange(group.head_dim)
    blocks = element.query_key if view in ("query", "key") else element.value_output
    same_order = element.groups is None and element.queries is None
    if blocks is None:
        return Map(None if same_order else index.flatten())
    copies = group.per_group if of_queries else 1
    if _are_permutations(blocks):  # each is its own inverse transposed
        return Map(index.gather(1, blocks.argmax(2).repeat_interleave(copies, dim=0)).flatten())
    blocks = blocks.double()
    if of_queries:
        blocks = _inverses(blocks).mT.repeat_interleave(copies, dim=0)
    return Map(None if same_order else index.flatten(), blocks)


def _inverses(blocks: Tensor) -> Tensor:
    """The inverse of every block [k, n, n], by one thread: the bits depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        inverses: Tensor = torch.linalg.inv(blocks)
    finally:
        torch.set_num_threads(threads)
    return inverses


def _are_permutations(blocks: Tensor) -> bool:
    """True if every block [k, n, n] is a permutation matrix."""
    ones = blocks == 1
    once = bool((ones.sum(1) == 1).all() and (ones.sum(2) == 1).all())
    return once and bool((ones | (blocks == 0)).all())


def only_moves(transform: Transform, group: str | None = None) -> bool:
    """True if entries only change places and keep every bit, in all groups or in the given one."""
    elements = transform.elements if group is None else {group: transform.elements.get(group)}
    parts = (
        Part(name, view)
        for name, element in elements.items()
        if element is not None
        for view in (HEAD_VIEWS if isinstance(element, HeadsElement) else ("", "'"))
    )
    return all(map_of(transform, part).exact for part in parts)


def mix(way: Map, y: Tensor) -> Tensor:
    """y [n, rest] rewritten by the map without its index."""
    wide = next(x.dtype for x in (way.blocks, way.before, way.after) if x is not None)
    y = y.to(wide, copy=True)
    if way.before is not None:
        y *= way.before[:, None]
    if way.blocks is not None:
        y = (way.blocks @ y.reshape(len(way.blocks), way.blocks.shape[2], -1)).flatten(0, 1)
    if way.after is not None:
        y *= way.after[:, None]
    return y


def cut(way: Map, start: int, stop: int) -> Map:
    """The map without its index for the old units from start to stop, which are whole blocks."""
    new, old = way.block
    blocks = None if way.blocks is None else way.blocks[start // old : stop // old]
    before = None if way.before is None else way.before[start:stop]
    after = None if way.after is None else way.after[start // old * new : stop // old * new]
    return Map(None, blocks, before, after)
