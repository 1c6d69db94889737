"""Two models under one symmetry table, and their unfolded tensors, whose products are the basis of every alignment.

Tensors are read one pair at a time, large ones by rows if no group acts on these: memory never holds a whole model.
Products are float32 (float64 for float64 tensors), each computed by one thread and added up in a fixed order in
float64: the result does not depend on the number of threads. A GPU gets tensors in their stored dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mergekit_lfm.arch.table import Part, Symmetries, part_size
from mergekit_lfm.artifacts.transform import Transform, TransformInfo
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.views.maps import CPU, Maps
from mergekit_lfm.views.rewritten import Rewriter

RUNNING = ("running_mean", "running_var")  # of BatchNorm: statistics, so large that they would outweigh the weights
READ_AT_ONCE = 1 << 24  # elements to read at a time if no group acts on the rows
ON_A_GPU = 4  # tensors to read and multiply at a time: reading overlaps with products, and a few fill the GPU

Use = tuple[str, int]  # a tensor, and one of its axes
Unfolded = tuple[Part, Tensor, Tensor]  # a part of the axis with both models' entries [units, rest]

T = TypeVar("T")
R = TypeVar("R")


class InOrder(Protocol):
    """A map whose results come in the order of the items."""

    def __call__(self, run: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """The results, one after another."""


@contextmanager
def one_thread_each(device: torch.device = CPU) -> Iterator[InOrder]:
    """A map over as many threads as torch may use; inside, a single thread, or the GPU, computes each operation."""
    count = torch.get_num_threads()
    at_once = count if device == CPU else min(count, ON_A_GPU)
    pool = ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,))

    def in_order(run: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        for first in range(0, len(items), at_once):  # in batches, because results are large
            yield from pool.map(run, items[first : first + at_once])

    torch.set_num_threads(1)
    try:
        yield in_order
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(count)


def overflow(what: str) -> PlanError:
    """The error for finite numbers whose products are not finite."""
    return PlanError(
        f"{what} overflow, expected finite products; divide the models' weights by a constant, or store them as float64"
    )


@dataclass(frozen=True)
class Side:
    """One of the models: its tensors' specs, and the checkpoint or mapping with their data."""

    label: str
    specs: Mapping[str, TensorSpec]
    tensors: Checkpoint | Mapping[str, Tensor]

    def read(self, name: str, first: int = 0, last: int | None = None, device: torch.device = CPU) -> Tensor:
        """Rows first .. last of a tensor, on a device, float32 or float64. Raises FormatError for NaN or infinity."""
        spec = self.specs[name]
        if isinstance(self.tensors, Checkpoint):
            row = spec.numel // max(1, spec.shape[0]) if spec.shape else 1
            flat = self.tensors.read(name, first * row, None if last is None else last * row)
            x = flat.view(-1, *spec.shape[1:]) if spec.shape else flat.view(())
        else:
            x = self.tensors[name].detach()
            x = x[first:last] if spec.shape else x
        x = x.to(device)
        if not x.isfinite().all():
            raise FormatError(f"{name} of {self.label} holds NaN or infinity, expected finite numbers; mend it")
        return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


@dataclass(frozen=True)
class Pair:
    """The model to rewrite, `source`, and the one to align it to, `to`.

    symmetries: the source's table; to_symmetries: the other's, the same except for counts if widths may differ.
    folded: the rotated groups: the gains of their norms are folded into the readers of these norms, in both models, and
    no longer count as tensors. scales: divisors for the tensors of both models; 1 for a name without one. device:
    multiplies the tensors; gains and the elements of transforms lie on the CPU. read_at_once: the most elements of a
    tensor to read at a time if no group acts on its rows; sums are rounded a little differently with another number.
    """

    source: Side
    to: Side
    symmetries: Symmetries
    to_symmetries: Symmetries
    in_order: InOrder
    folded: frozenset[str] = field(default=frozenset())
    scales: Mapping[str, float] = field(default_factory=dict)
    device: torch.device = CPU
    read_at_once: int = READ_AT_ONCE

    @cached_property
    def gains(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The gains of the norms on folded groups, of `to` and of the source, by norm."""
        return {norm: (self.to.read(name), self.source.read(name)) for norm, name in self.gain_names.items()}

    @cached_property
    def gain_names(self) -> dict[str, str]:
        """The tensors that are gains of the norms on folded groups, by norm."""
        return {
            part.norm: name
            for name, axes in self.symmetries.tensors.items()
            for part in (axes[0] if axes else ())
            if part.view == "gain" and part.norm and part.group in self.folded
        }

    @cached_property
    def names(self) -> list[str]:
        """The tensors that alignment compares: of floating dtype, without folded gains and running statistics."""
        return [
            name
            for name, axes in self.symmetries.tensors.items()
            if getattr(torch, self.source.specs[name].dtype).is_floating_point
            and not name.endswith(RUNNING)
            and not any(part.view == "gain" and part.group in self.folded for axis in axes for part in axis)
        ]

    def uses(self, group: str, views: Iterable[str] | None = None) -> list[Use]:
        """The axes on which the group acts, with `views` only those where it acts in one of these."""
        wanted = None if views is None else set(views)
        return [
            (name, axis)
            for name in self.names
            for axis, parts in enumerate(self.symmetries.tensors[name])
            if any(part.group == group and (wanted is None or part.view in wanted) for part in parts)
        ]

    def numel(self, uses: Iterable[Use]) -> int:
        """The number of entries of these tensors, together."""
        return sum(self.source.specs[name].numel for name, _ in uses)

    def known_uses(self, uses: Iterable[Use], known: Iterable[str]) -> list[Use]:
        """The uses whose other axes are free or belong to known groups."""
        fixed = {None, *known}
        return [
            (name, axis)
            for name, axis in uses
            if all(
                part.group in fixed
                for other, parts in enumerate(self.symmetries.tensors[name])
                if other != axis
                for part in parts
            )
        ]

    def anchored(self, groups: Iterable[str], views: Iterable[str] | None = None) -> Iterator[tuple[str, list[Use]]]:
        """The groups in an order in which each can be found from those before it, with the uses that determine it.

        Next is always the group with the greatest known share of entries: those in tensors whose other axes are free
        or belong to earlier groups. Groups outside `groups` count as known. A group without known uses comes last,
        with no uses. views: as in `uses`.
        """
        views = None if views is None else tuple(views)
        waiting = {group: self.uses(group, views) for group in groups}
        known = [group for group in self.symmetries.groups if group not in waiting]
        while waiting:
            usable = {group: self.known_uses(uses, known) for group, uses in waiting.items()}
            group = max(waiting, key=lambda g: self.numel(usable[g]) / max(1, self.numel(waiting[g])))
            del waiting[group]
            known.append(group)
            yield group, usable[group]

    def unfolded(
        self, use: Use, group: str, transform: Transform, views: Iterable[str] | None = None
    ) -> Iterator[Unfolded]:
        """Every part of the axis on which the group acts, the source's other axes rewritten, on the pair's device.

        A part of a large tensor comes several times, each time with the entries of some rows. views: as in `uses`.
        Raises FormatError for NaN or infinity, PlanError if products with gains overflow.
        """
        name, axis = use
        wanted = None if views is None else set(views)
        for a, b in self._pairs(name, transform, axis):
            first_a = first_b = 0
            lengths = (s.lengths(name, axis, x.shape[axis]) for s, x in ((self.to_symmetries, a), (self.symmetries, b)))
            for part, size_a, size_b in zip(self.symmetries.tensors[name][axis], *lengths, strict=True):
                if part.group == group and (wanted is None or part.view in wanted):
                    x, y = a.narrow(axis, first_a, size_a), b.narrow(axis, first_b, size_b)
                    units_a = part_size(self.to_symmetries.groups, part)
                    units_b = part_size(self.symmetries.groups, part)
                    yield part, *(z.movedim(axis, 0).reshape(n, -1) for z, n in ((x, units_a), (y, units_b)))
                first_a, first_b = first_a + size_a, first_b + size_b

    def norms(self) -> dict[str, float]:
        """The geometric mean of every tensor's norms in both models; 1 if one of them is 0."""
        untouched = Transform(self.symmetries, {}, TransformInfo("norms"))

        def of(name: str) -> float:
            squares = [
                (float(a.double().square().sum()), float(b.double().square().sum()))
                for a, b in self._pairs(name, untouched, None)
            ]
            norms = [sum(numbers) ** 0.25 for numbers in zip(*squares, strict=True)]
            if not math.isfinite(norms[0] * norms[1]):
                raise overflow(f"the squares of {name}")
            return norms[0] * norms[1] or 1.0

        return dict(zip(self.names, self.in_order(of, self.names), strict=True))

    def closeness(self, transform: Transform, names: Iterable[str] | None = None) -> tuple[float, float]:
        """The inner product of `to` with the rewritten source, and the squared distance between the two.

        names: the tensors that count; all by default. Raises PlanError if the sums overflow.
        """

        def of(name: str) -> tuple[float, float]:
            pairs = ((a.double(), b.double()) for a, b in self._pairs(name, transform, None))
            panels = [(float((a * b).sum()), float((a - b).square().sum())) for a, b in pairs]
            total = sum(inner for inner, _ in panels), sum(squares for _, squares in panels)
            if not (math.isfinite(total[0]) and math.isfinite(total[1])):
                raise overflow(f"the products of {name} of the two models")
            return total

        sums = list(self.in_order(of, self.names if names is None else sorted(set(names))))
        return sum(inner for inner, _ in sums), sum(squares for _, squares in sums)

    def _pairs(self, name: str, transform: Transform, skip: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Both models' tensor, or panels of its rows, folded; the source's rewritten along all axes but `skip`."""
        axes = self.symmetries.tensors[name]
        shape = self.source.specs[name].shape
        free = [all(part.group is None for part in parts) for parts in axes]
        rewriter = Rewriter(Maps(transform, self.device), self.source.specs[name])
        for first, last in _panels(shape, bool(free) and free[0] and skip != 0, self.read_at_once):
            a = self._fold(name, self.to.read(name, first, last, self.device), 0)
            b = self._fold(name, self.source.read(name, first, last, self.device), 1)
            for side, x in ((self.to, a), (self.source, b)):
                if not x.isfinite().all():
                    raise overflow(f"the products of {name} in {side.label} with the gains of the norm that it reads")
            dtype = torch.promote_types(a.dtype, b.dtype)
            for axis in range(len(shape)):
                if axis != skip and not free[axis]:
                    b = rewriter.along(b, axis)
            scale = self.scales.get(name, 1.0)
            yield a.to(dtype) / scale, b.to(dtype) / scale

    def _fold(self, name: str, x: Tensor, which: int) -> Tensor:
        """x times the gains of the folded norms that it reads."""
        for axis, parts in enumerate(self.symmetries.tensors[name]):
            if any(part.view == "'" and part.norm in self.gains for part in parts):
                sizes = self.symmetries.lengths(name, axis, x.shape[axis])
                factors = torch.cat([self._gain(p, which, n) for p, n in zip(parts, sizes, strict=True)])
                x = x * factors.to(x).view(-1, *[1] * (x.ndim - axis - 1))
        return x

    def _gain(self, part: Part, which: int, size: int) -> Tensor:
        if part.view != "'" or part.norm not in self.gains:
            return torch.ones(size)
        gain = self.gains[part.norm][which]
        return gain.repeat_interleave(size // len(gain))


def _panels(shape: Sequence[int], free: bool, most: int) -> list[tuple[int, int | None]]:
    """(first row, last row) of each panel, of at most so many elements; one of all rows if a group acts on them."""
    numel = 1
    for size in shape:
        numel *= size
    if not free or numel <= most:
        return [(0, None)]
    step = max(1, most * shape[0] // numel)
    return [(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]
