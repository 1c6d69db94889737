"""Tensors rewritten by a transform: whole in memory, or while a checkpoint is read.

An order is exact in any dtype. Products are float64, or float32 for 16-bit tensors, rounded once to the stored dtype,
in panels of rows that do not depend on what is asked for: the bytes are the same for any range, chunk and thread.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from operator import itemgetter
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mergekit_lfm.arch.table import HEAD_VIEWS, Heads, Part, part_size
from mergekit_lfm.artifacts.transform import PANEL, HeadsElement, Transform, UnitsElement
from mergekit_lfm.errors import PlanError
from mergekit_lfm.kernels.sums import round_once
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.formats import WeightFile, bytes_of
from mergekit_lfm.store.tensors import TensorSpec

CPU = torch.device("cpu")
NARROW = 1024  # rows that one block may mix before the whole tensor is rewritten at once


@dataclass(frozen=True)
class Map:
    """What a transform does along a run of an axis: new = after * (blocks @ (before * old[index])).

    index: int64 [n]; blocks: [k, out, in] on the diagonal; before [n] and after [m]; None leaves that step out. values:
    [n] that take the place of all of it. All but the index are of the dtype of the arithmetic.
    """

    index: Tensor | None = None
    blocks: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None
    values: Tensor | None = None

    @property
    def exact(self) -> bool:
        """Whether entries only change places."""
        return self.blocks is None and self.before is None and self.after is None and self.values is None

    @property
    def block(self) -> tuple[int, int]:
        """(new units, old units) that are mixed with one another."""
        return (1, 1) if self.blocks is None else (self.blocks.shape[1], self.blocks.shape[2])


IDENTITY = Map()
Arithmetic = Literal["float32", "float64"]


class Maps:
    """What a transform does along every part of its table, each made once: matrices are large, and used by many.

    device: where the maps lie, and what they rewrite has to.
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

    def _cast(self, made: Map, part: Part, arithmetic: Arithmetic) -> Map:
        place, dtype = self.device, getattr(torch, arithmetic)
        wide = ("before", "after", "values")
        cast = {name: x.to(place, dtype) for name in wide if (x := getattr(made, name)) is not None}
        if made.index is not None:
            cast["index"] = made.index.to(place)
        if made.blocks is not None:  # the same for all norms of a group
            shared = part.group, part.view, arithmetic
            cast["blocks"] = self._blocks.setdefault(shared, made.blocks.to(place, dtype))
        return replace(made, **cast) if cast else made

    @property
    def nbytes(self) -> int:
        """Bytes of the transform and of all maps that were made."""
        held = [x for element in self.transform.elements.values() for x in vars(element).values() if x is not None]
        held += [x for way in self._made.values() for x in vars(way).values() if x is not None]
        return sum({x.data_ptr(): x.untyped_storage().nbytes() for x in held}.values())


def map_of(transform: Transform, part: Part) -> Map:
    """What the transform does along a part of an axis."""
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
    still = element.groups is None and element.queries is None
    if blocks is None:
        return Map(None if still else index.flatten())
    copies = group.per_group if of_queries else 1
    if _permute(blocks):  # orders, which are their own inverse transposed
        return Map(index.gather(1, blocks.argmax(2).repeat_interleave(copies, dim=0)).flatten())
    blocks = blocks.double()
    if of_queries:
        blocks = _inverses(blocks).mT.repeat_interleave(copies, dim=0)
    return Map(None if still else index.flatten(), blocks)


def _inverses(blocks: Tensor) -> Tensor:
    """The inverse of every block [k, n, n], by one thread: the bits depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        inverses: Tensor = torch.linalg.inv(blocks)
    finally:
        torch.set_num_threads(threads)
    return inverses


def _permute(blocks: Tensor) -> bool:
    """Whether every block [k, n, n] is a permutation matrix."""
    ones = blocks == 1
    once = bool((ones.sum(1) == 1).all() and (ones.sum(2) == 1).all())
    return once and bool((ones | (blocks == 0)).all())


def only_moves(transform: Transform, group: str | None = None) -> bool:
    """Whether entries only change places, and keep every bit: in all groups, or in this one."""
    elements = transform.elements if group is None else {group: transform.elements.get(group)}
    parts = (
        Part(name, view)
        for name, element in elements.items()
        if element is not None
        for view in (HEAD_VIEWS if isinstance(element, HeadsElement) else ("", "'"))
    )
    return all(map_of(transform, part).exact for part in parts)


@dataclass(frozen=True)
class Run:
    """A run of an axis with what is done along it. each: entries that every unit has, in a row.

    first, size: where it lies in the old axis; new_size: its length in the new one.
    """

    map: Map
    each: int
    first: int
    size: int
    new_size: int

    def apply(self, x: Tensor, axis: int) -> Tensor:
        """x with this run of its axis, and no more, rewritten; of the map's dtype unless only the order changes."""
        if self.map.values is not None:
            return self.map.values
        if self.map.exact and self.map.index is None:
            return x
        moved = x.movedim(axis, 0)
        rest = moved.shape[1:]
        y = moved.reshape(self.size // self.each, -1)
        if self.map.index is not None:
            y = y[self.map.index]
        if not self.map.exact:
            y = _mixed(self.map, y)
        return y.reshape(self.new_size, *rest).movedim(0, axis)


def _mixed(way: Map, y: Tensor) -> Tensor:
    """The map of y [n, rest], but for its index."""
    wide = next(x.dtype for x in (way.blocks, way.before, way.after) if x is not None)
    y = y.to(wide, copy=True)
    if way.before is not None:
        y *= way.before[:, None]
    if way.blocks is not None:
        y = (way.blocks @ y.reshape(len(way.blocks), way.blocks.shape[2], -1)).flatten(0, 1)
    if way.after is not None:
        y *= way.after[:, None]
    return y


class Rewriter:
    """How one tensor is rewritten. shape: the new one."""

    def __init__(self, maps: Maps, spec: TensorSpec) -> None:
        self.old = spec
        self.axes = [_runs(maps, spec, axis) for axis in range(len(spec.shape))]
        shape = tuple(sum(run.new_size for run in runs) for runs in self.axes)
        self.spec = TensorSpec(spec.name, shape, spec.dtype)
        self.idle = all(run.map == IDENTITY for runs in self.axes for run in runs)
        # one axis, or one whose entries are mixed over all of it: the tensor is rewritten at once
        wide = self.axes and any(run.map.block[1] * run.each > NARROW for run in self.axes[0])
        self.whole = len(shape) < 2 or wide or self.spec.numel <= PANEL

    @property
    def scratch(self) -> int:
        """Bytes that rewriting holds beside what is read and returned."""
        if self.idle:
            return 0
        panel = max(last - first for first, last in self.panels) * self._row
        return (
            (max(self.old.numel, self.spec.numel) if self.whole else panel) * 8 * 4
        )  # float64, and what it is made of

    @property
    def _row(self) -> int:
        """Elements of a row of the old or new tensor, whichever has more."""
        return max(self.old.numel // max(1, self.old.shape[0]), self.spec.numel // max(1, self.spec.shape[0]))

    def apply(self, x: Tensor) -> Tensor:
        """The rewritten tensor, of one that lies in memory."""
        if self.whole:
            return self._rounded(self._columns(self.along(x, 0)))
        return torch.cat([self.rows(first, last, lambda a, b: x[a:b]) for first, last in self.panels])

    def along(self, x: Tensor, axis: int) -> Tensor:
        """x, or rows of it, rewritten along one axis; float32 or float64 unless only the order changes."""
        runs = self.axes[axis]
        parts = [run.apply(x.narrow(axis, run.first, run.size), axis) for run in runs]
        if len(parts) == 1:
            return parts[0]
        dtype = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)
        return torch.cat([part.to(dtype) for part in parts], axis)

    def _columns(self, x: Tensor) -> Tensor:
        for axis in range(1, len(self.axes)):
            x = self.along(x, axis)
        return x

    def _rounded(self, x: Tensor) -> Tensor:
        return round_once(x, getattr(torch, self.spec.dtype)).contiguous()

    @cached_property
    def panels(self) -> list[tuple[int, int]]:
        """(first row, last row) of the new tensor's panels; of one that is rewritten at once, all of its rows."""
        if self.whole:
            return [(0, self.spec.shape[0])]
        edges = [0]
        for run in self.axes[0]:
            begin, block = edges[-1], run.map.block[0] * run.each
            step = max(1, PANEL // (block * max(1, self._row))) * block
            edges += [*range(begin + step, begin + run.new_size, step), begin + run.new_size]
        return list(pairwise(edges))

    def rows(self, first: int, last: int, read: Callable[[int, int], Tensor]) -> Tensor:
        """A panel of the new tensor. read: rows of the old one, from the first to the last."""
        begin = 0
        for run in self.axes[0]:
            if first < begin + run.new_size:
                break
            begin += run.new_size
        new, old = (size * run.each for size in run.map.block)
        start, stop = (first - begin) // new * old, (last - begin) // new * old
        wanted = torch.arange(start, stop)
        if run.map.index is not None:
            units = run.map.index[start // run.each : stop // run.each]
            wanted = (units[:, None] * run.each + torch.arange(run.each)).flatten()
        x = self._columns(_gathered(wanted + run.first, read))
        if not run.map.exact:
            y = x.reshape(len(wanted) // run.each, -1)
            x = _mixed(_cut(run.map, start // run.each, stop // run.each), y).reshape(last - first, *x.shape[1:])
        return self._rounded(x)


def _cut(way: Map, start: int, stop: int) -> Map:
    """The map less its index, of the old units from start to stop, which are whole blocks."""
    new, old = way.block
    blocks = None if way.blocks is None else way.blocks[start // old : stop // old]
    before = None if way.before is None else way.before[start:stop]
    after = None if way.after is None else way.after[start // old * new : stop // old * new]
    return Map(None, blocks, before, after)


def _gathered(rows: Tensor, read: Callable[[int, int], Tensor]) -> Tensor:
    """The rows with these numbers, read in runs that lie one after another."""
    numbers = rows.tolist()
    breaks = [0, *(i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1), len(numbers)]
    return torch.cat([read(numbers[a], numbers[b - 1] + 1) for a, b in pairwise(breaks)])


def _runs(maps: Maps, spec: TensorSpec, axis: int) -> list[Run]:
    symmetries = maps.transform.symmetries
    arithmetic: Arithmetic = "float32" if spec.dtype in ("float16", "bfloat16") else "float64"
    runs, first = [], 0
    for part, size in zip(
        symmetries.tensors[spec.name][axis], symmetries.lengths(spec.name, axis, spec.shape[axis]), strict=True
    ):
        if part.group is None:
            runs.append(Run(IDENTITY, 1, first, size, size))
        else:
            way, each = maps.of(part, arithmetic), size // part_size(symmetries.groups, part)
            new, old = way.block
            runs.append(Run(way, each, first, size, size // old * new))
        first += size
    return runs


def rewrite(tensors: Mapping[str, Tensor], transform: Transform) -> dict[str, Tensor]:
    """Every tensor of a model as the transform rewrites it, in its dtype. PlanError where one is not in the table."""
    result, maps = {}, Maps(transform)
    for name, x in tensors.items():
        if name not in transform.symmetries.tensors:
            raise PlanError(f"{name} {list(x.shape)} is not in the transform's table; align the models again")
        rewriter = Rewriter(maps, TensorSpec(name, tuple(x.shape), str(x.dtype).removeprefix("torch.")))
        result[name] = x if rewriter.idle else rewriter.apply(x)
    return result


class ByRows(Protocol):
    """What makes a tensor anew while it is read: panels of rows of the new one, from rows of the stored one."""

    old: TensorSpec
    spec: TensorSpec
    idle: bool
    whole: bool

    @property
    def panels(self) -> list[tuple[int, int]]: ...
    @property
    def scratch(self) -> int: ...
    def apply(self, x: Tensor, /) -> Tensor: ...
    def rows(self, first: int, last: int, read: Callable[[int, int], Tensor], /) -> Tensor: ...


class RewrittenFile(WeightFile):
    """A file of tensors that are rewritten as they are read. What is left alone still is a range of the file.

    held: gives the bytes that all rewriters hold. kept: of each thread the panel that it asked for last, in any file of
    the checkpoint: neighbouring ranges share it.
    """

    inner: WeightFile

    def __init__(
        self,
        inner: WeightFile,
        rewriters: Mapping[str, ByRows],
        held: Callable[[], int],
        kept: threading.local,
    ) -> None:
        self.inner, self.rewriters, self._held, self._kept = inner, rewriters, held, kept
        self.path, self.data_start = inner.path, inner.data_start
        self.nbytes, self.stamp, self.snapshot = inner.nbytes, inner.stamp, inner.snapshot
        self.fallback = inner.fallback
        self.tensors = {name: (rewriters[name].spec, offset) for name, (_, offset) in inner.tensors.items()}

    @property
    def resident(self) -> int:
        return self._held()

    def fileno(self) -> int:
        return self.inner.fileno()

    def offset(self, name: str) -> int | None:
        return self.inner.offset(name) if self.rewriters[name].idle else None

    def scratch(self, name: str) -> int:
        return self.rewriters[name].scratch

    def at_once(self, name: str) -> bool:
        rewriter = self.rewriters[name]
        return rewriter.whole and not rewriter.idle

    def read_into(self, name: str, start: int, into: memoryview) -> None:
        """Fill `into` with the rewritten tensor's bytes from byte `start` on; both are whole elements."""
        rewriter = self.rewriters[name]
        if rewriter.idle:
            self.inner.read_into(name, start, into)
            return
        spec = rewriter.spec
        row = spec.nbytes // max(1, spec.shape[0])
        at = bisect_right(rewriter.panels, start // row, key=itemgetter(0)) - 1
        for first, last in rewriter.panels[at:]:
            begin = first * row
            if begin >= start + len(into):
                break
            lower, upper = max(start, begin), min(start + len(into), last * row)
            data = bytes_of(self._panel(name, first, last))
            into[lower - start : upper - start] = data[lower - begin : upper - begin]

    def _panel(self, name: str, first: int, last: int) -> Tensor:
        if getattr(self._kept, "key", None) != (name, first):
            self._kept.key = self._kept.panel = None  # not held beside the next one
            rewriter = self.rewriters[name]
            if rewriter.whole:
                panel = rewriter.apply(self._read(name, 0, rewriter.old.shape[0]))
            else:
                panel = rewriter.rows(first, last, lambda a, b: self._read(name, a, b))
            self._kept.key, self._kept.panel = (name, first), panel
        kept: Tensor = self._kept.panel
        return kept

    def _read(self, name: str, first: int, last: int) -> Tensor:
        """Rows of the tensor as it is stored."""
        spec = self.rewriters[name].old
        found = torch.empty(last - first, *spec.shape[1:], dtype=getattr(torch, spec.dtype))
        row = found.nbytes // max(1, last - first)
        self.inner.read_into(name, first * row, bytes_of(found))
        return found


def rewritten(checkpoint: Checkpoint, transform: Transform, view: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint as the transform rewrites it, read like any other. view: what stands for the transform."""
    maps, kept = Maps(transform), threading.local()
    rewriters = {name: Rewriter(maps, spec) for name, spec in checkpoint.items()}
    files = [RewrittenFile(file, rewriters, lambda: maps.nbytes, kept) for file in checkpoint.files]
    return Checkpoint(checkpoint.path, files, view)
