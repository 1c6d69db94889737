"""Tensors rewritten by a transform: whole in memory, or while a checkpoint is read.

A new order, or a choice of units, is exact in any dtype. Products are float64, or float32 for 16-bit tensors, rounded
once to the stored dtype, in panels of rows that do not depend on the range that is read: the bytes are the same for any
range, chunk and thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor

from mergekit_lfm.arch.table import part_size
from mergekit_lfm.artifacts.transform import PANEL, Transform
from mergekit_lfm.errors import PlanError
from mergekit_lfm.kernels.sums import round_once
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.views.base import ReadRows, Source, View
from mergekit_lfm.views.maps import IDENTITY, NARROW, Arithmetic, Map, Maps, cut, mix


@dataclass(frozen=True)
class Stretch:
    """A run of an axis with its map. each: consecutive entries of a unit.

    first, size: its start and length in the old axis; new_size: its length in the new one.
    """

    map: Map
    each: int
    first: int
    size: int
    new_size: int

    def apply(self, x: Tensor, axis: int) -> Tensor:
        """x, only this run of its axis, rewritten; in the map's dtype unless only the order changes."""
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
            y = mix(self.map, y)
        return y.reshape(self.new_size, *rest).movedim(0, axis)


class Rewriter:
    """Rewrites one tensor. old, spec: the stored and the new tensor.

    panel: elements to rewrite at a time. narrow: rows that one block may mix before the whole tensor is rewritten at
    once. Products of other panels may be rounded differently: both determine the bytes.
    """

    def __init__(self, maps: Maps, spec: TensorSpec, *, panel: int = PANEL, narrow: int = NARROW) -> None:
        self.old, self.panel = spec, panel
        self.axes = [_runs(maps, spec, axis) for axis in range(len(spec.shape))]
        shape = tuple(sum(run.new_size for run in runs) for runs in self.axes)
        self.spec = TensorSpec(spec.name, shape, spec.dtype)
        self.idle = all(run.map == IDENTITY for runs in self.axes for run in runs)
        # a vector, or an axis whose entries are mixed over all of it: the tensor is rewritten at once
        wide = self.axes and any(run.map.block[1] * run.each > narrow for run in self.axes[0])
        self.whole = len(shape) < 2 or wide or self.spec.numel <= panel

    @property
    def sources(self) -> tuple[Source, ...]:
        return ((0, self.old.name),)

    @property
    def scratch(self) -> int:
        """Bytes that rewriting holds, its input and result included."""
        if self.idle:
            return 0
        panel = max(last - first for first, last in self.panels) * self._row
        numel = max(self.old.numel, self.spec.numel) if self.whole else panel
        return numel * 8 * 4  # float64, and its intermediates

    @property
    def _row(self) -> int:
        """Elements of a row of the old or new tensor, whichever has more."""
        return max(self.old.numel // max(1, self.old.shape[0]), self.spec.numel // max(1, self.spec.shape[0]))

    def apply(self, x: Tensor) -> Tensor:
        """Rewrite a tensor in memory."""
        if self.whole:
            return self._round(self._rewrite_columns(self.along(x, 0)))
        return torch.cat([self.rows(first, last, lambda _, a, b: x[a:b]) for first, last in self.panels])

    def along(self, x: Tensor, axis: int) -> Tensor:
        """x, or rows of it, rewritten along one axis; float32 or float64 unless only the order changes."""
        runs = self.axes[axis]
        parts = [run.apply(x.narrow(axis, run.first, run.size), axis) for run in runs]
        if len(parts) == 1:
            return parts[0]
        dtype = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)
        return torch.cat([part.to(dtype) for part in parts], axis)

    def _rewrite_columns(self, x: Tensor) -> Tensor:
        for axis in range(1, len(self.axes)):
            x = self.along(x, axis)
        return x

    def _round(self, x: Tensor) -> Tensor:
        return round_once(x, getattr(torch, self.spec.dtype)).contiguous()

    @cached_property
    def panels(self) -> list[tuple[int, int]]:
        """(first row, last row) of the new tensor's panels; all rows if the tensor is rewritten at once."""
        if self.whole:
            return [(0, self.spec.shape[0])]
        edges = [0]
        for run in self.axes[0]:
            begin, block = edges[-1], run.map.block[0] * run.each
            step = max(1, self.panel // (block * max(1, self._row))) * block
            edges += [*range(begin + step, begin + run.new_size, step), begin + run.new_size]
        return list(pairwise(edges))

    def rows(self, first: int, last: int, read: ReadRows) -> Tensor:
        """A panel of the new tensor. read: returns rows of the old one."""
        (source,) = self.sources
        if self.whole:
            return self.apply(read(source, 0, self.old.shape[0]))
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
        x = self._rewrite_columns(_gather(wanted + run.first, partial(read, source)))
        if not run.map.exact:
            y = x.reshape(len(wanted) // run.each, -1)
            x = mix(cut(run.map, start // run.each, stop // run.each), y).reshape(last - first, *x.shape[1:])
        return self._round(x)


def _gather(rows: Tensor, read: Callable[[int, int], Tensor]) -> Tensor:
    """The rows with these numbers; consecutive ones are read together."""
    numbers = rows.tolist()
    breaks = [0, *(i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1), len(numbers)]
    return torch.cat([read(numbers[a], numbers[b - 1] + 1) for a, b in pairwise(breaks)])


def _runs(maps: Maps, spec: TensorSpec, axis: int) -> list[Stretch]:
    symmetries = maps.transform.symmetries
    arithmetic: Arithmetic = "float32" if spec.dtype in ("float16", "bfloat16") else "float64"
    runs, first = [], 0
    for part, size in zip(
        symmetries.tensors[spec.name][axis], symmetries.lengths(spec.name, axis, spec.shape[axis]), strict=True
    ):
        if part.group is None:
            runs.append(Stretch(IDENTITY, 1, first, size, size))
        else:
            way, each = maps.of(part, arithmetic), size // part_size(symmetries.groups, part)
            new, old = way.block
            units = size // each if way.index is None else len(way.index)
            runs.append(Stretch(way, each, first, size, units // old * new * each))
        first += size
    return runs


def rewrite(
    tensors: Mapping[str, Tensor], transform: Transform, *, panel: int = PANEL, narrow: int = NARROW
) -> dict[str, Tensor]:
    """Every tensor of a model as the transform rewrites it, in its dtype. Raises PlanError if the table lacks one.

    panel, narrow: as of `Rewriter`.
    """
    result, maps = {}, Maps(transform)
    for name, x in tensors.items():
        if name not in transform.symmetries.tensors:
            raise PlanError(f"{name} {list(x.shape)} is not in the transform's table; align the models again")
        rewriter = Rewriter(
            maps, TensorSpec(name, tuple(x.shape), str(x.dtype).removeprefix("torch.")), panel=panel, narrow=narrow
        )
        result[name] = x if rewriter.idle else rewriter.apply(x)
    return result


@final
class Rewritten(View):
    """The checkpoint as the transform rewrites it. key: identifies the transform in digests.

    panel, narrow: as of `Rewriter`.
    """

    def __init__(
        self,
        inner: Checkpoint,
        transform: Transform,
        key: Mapping[str, Any],
        *,
        panel: int = PANEL,
        narrow: int = NARROW,
    ) -> None:
        self._maps, self._sizes = Maps(transform), (panel, narrow)
        self._rewriters = {n: Rewriter(self._maps, spec, panel=panel, narrow=narrow) for n, spec in inner.items()}
        super().__init__({name: rewriter.spec for name, rewriter in self._rewriters.items()}, (inner,), key)

    def __reduce__(self) -> tuple[Any, ...]:
        """Its copy makes the maps again: pickled, tensors that share their memory would not."""
        panel, narrow = self._sizes
        make = partial(Rewritten, panel=panel, narrow=narrow)
        return make, (self.inners[0], self._maps.transform, self.key), {"path": self.path}

    @property
    def held(self) -> int:
        return self._maps.nbytes

    def maker(self, name: str) -> Rewriter | None:
        rewriter = self._rewriters[name]
        return None if rewriter.idle else rewriter
