"""Carry out the plan of an adapter: one matrix of one model's change in memory at a time, in each thread.

A thread does a matrix alone and with one thread of torch's, so that the bytes do not depend on their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.kernels.low_rank import FIRST, LowRank, approximate, energy_of, is_exact, rank_for, scratch
from mergekit_lfm.kernels.random import key
from mergekit_lfm.machine.sizes import format_size
from mergekit_lfm.output.adapter import NewAdapter
from mergekit_lfm.plan.extraction import Extraction
from mergekit_lfm.plan.groups import Group
from mergekit_lfm.store.tensors import ITEMSIZE

AT_ONCE = 1 << 22  # elements of a tensor that is compared and not decomposed
LEAST = 1e-13  # of the energy: the square of what float32 resolves, and less
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Ranks:
    """How ranks are chosen, by one of three: one rank for all, a share of each change's energy, or bytes for all.

    exact: to decompose without random numbers.
    """

    rank: int | None = None
    energy: float | None = None
    nbytes: int | None = None
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Reduced:
    """A product in the adapter: the tensor, its shape [out, in], the rank, |D|^2, and the part that is kept.

    count: of experts.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    energy: float
    kept: float
    count: int = 1


@dataclass
class Extractor:
    """The plan with what it takes. dtype: of the factors. device: of the arithmetic. done: is called with bytes."""

    plan: Extraction
    ranks: Ranks
    dtype: torch.dtype
    device: torch.device
    threads: int
    done: Callable[[int], None]

    def changed(self, names: Iterable[str]) -> dict[str, float]:
        """Those of the tensors, compared in parts, that changed, and |D|^2 of each; 0 for one that the base lacks."""
        names = list(names)
        energies = dict(zip(names, self._map(self._compare, names), strict=True))
        return {name: energy for name, energy in energies.items() if energy or name in self.plan.added}

    def write(self, adapter: NewAdapter, groups: Sequence[Group], ranks: Mapping[str, int]) -> list[Reduced]:
        """Decompose groups and add them to the adapter. ranks: by group, where they are known."""
        reduced = self._map(lambda group: self._reduce(adapter, group, ranks.get(group.name)), groups)
        return [each for each in reduced if each.energy]

    def share(self, groups: Sequence[Group], nbytes: int) -> dict[str, int]:
        """Ranks by group whose factors take at most so many bytes, the largest energies for a byte first."""
        size = ITEMSIZE[str(self.dtype).removeprefix("torch.")]
        widths = [group.width * self.plan.copies(group.module) for group in groups]
        most = {
            group.name: min(group.most, nbytes // (size * width)) for group, width in zip(groups, widths, strict=True)
        }
        spectra = self._map(lambda group: self._spectrum(group, most[group.name]), groups)
        offers = [
            (-energy / widths[i], i, rank)
            for i, spectrum in enumerate(spectra)
            for rank, energy in enumerate(spectrum, 1)
            if energy > 0
        ]
        ranks, left, full = {group.name: 0 for group in groups}, nbytes, set[int]()
        for _, i, rank in sorted(offers):
            cost = size * widths[i]
            if i in full or cost > left:
                full.add(i)  # a rank needs those before it
                continue
            ranks[groups[i].name], left = rank, left - cost
        return ranks

    def memory(self, group: Group) -> int:
        """Bytes that decomposing a matrix of a group takes at most, and all factors of the group."""
        rank = min(self.ranks.rank or group.most, group.most)
        numbers = scratch(group.out, group.columns, rank, exact=self.ranks.exact)
        numbers += 2 * group.out * group.columns  # of both models; their difference counts there
        factors = group.width * rank if len(group.members) > 1 else 0
        return (8 if _is_wide(self.plan, group) else 4) * (numbers + factors)

    def _compare(self, name: str) -> float:
        """|D|^2 of a tensor, 0 of one that the base lacks."""
        plan, energy = self.plan, 0.0
        spec = plan.model[name]
        if name not in plan.added:
            for start in range(0, spec.numel, AT_ONCE):
                ours, theirs = (side.read(name, start, start + AT_ONCE).double() for side in (plan.model, plan.base))
                energy += float(ours.sub_(theirs).square_().sum())
            _check_finite(energy, name)
        self.done(spec.nbytes)
        return energy

    def _reduce(self, adapter: NewAdapter, group: Group, rank: int | None) -> Reduced:
        """Decompose a group and add it to the adapter."""
        known, tried = None, rank
        if rank is None:
            rank, tried, known = self._search(group)
        assert tried is not None
        pairs, energy, kept = list[tuple[Tensor, Tensor]](), 0.0, 0.0
        for e in range(len(group.members)):
            near = known if known is not None else self._approximate(group, e, max(tried, 1))
            energy, kept = energy + near.total, kept + float(near.energies[:rank].sum())
            pairs.append(_round(near.factors(rank), self.dtype, group.name))
            self.done(group.out * group.columns * ITEMSIZE[self.plan.model[group.names[0]].dtype])
        if energy and rank:
            add_group(adapter, group, pairs)
        kept = min(kept, energy)  # up to the rounding of the basis
        return Reduced(group.name, (group.out, group.columns), rank, energy, kept, len(group.members))

    def _search(self, group: Group) -> tuple[int, int, LowRank | None]:
        """The least rank that keeps the share of the energy, the rank that was tried, and the result for one matrix."""
        share, tried = self.ranks.energy, FIRST
        assert share is not None
        while True:
            if is_exact(group.out, group.columns, tried, exact=self.ranks.exact):
                tried = group.most
            sums, total, near = torch.zeros(tried, dtype=torch.float64), 0.0, None
            for e in range(len(group.members)):
                near = self._approximate(group, e, tried)
                sums, total = sums + near.energies, total + near.total
            rank = rank_for(sums, total, share)
            if rank is None and tried == group.most:  # all of them, up to rounding
                rank = int((sums > total * LEAST).sum())
            if rank is not None:
                return rank, tried, near if len(group.members) == 1 else None
            tried *= 2

    def _spectrum(self, group: Group, rank: int) -> list[float]:
        """The energies of a group's first ranks, each the sum over its matrices."""
        sums = torch.zeros(rank, dtype=torch.float64)
        for e in range(len(group.members) if rank else 0):
            sums += self._approximate(group, e, rank).energies
        self.done(sum(self.plan.model[name].nbytes for name in group.names))
        energies: list[float] = sums.tolist()
        return energies

    def _approximate(self, group: Group, e: int, rank: int) -> LowRank:
        """The first directions of what changed in a matrix of a group."""
        change = _read_change(self.plan, group, e).to(self.device)
        return approximate(change, rank, key(0, group.name, e), exact=self.ranks.exact)

    def _map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """The results of the work on each item, in their order."""
        before = torch.get_num_threads()
        pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        try:
            return list(pool.map(work, items))
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)


def _read_change(plan: Extraction, group: Group, e: int) -> Tensor:
    """The difference [out, in] of a matrix between the models."""
    dtype = torch.float64 if _is_wide(plan, group) else torch.float32
    parts = []
    for name, start, rows, columns in group.members[e]:
        change = plan.model.read(name, start, start + rows * columns).to(dtype)
        change -= plan.base.read(name, start, start + rows * columns).to(dtype)
        change = change.view(rows, columns)
        _check_finite(energy_of(change), name)
        parts.append(change)
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.T if group.turned else whole


def _check_finite(number: float, name: str) -> None:
    if not math.isfinite(number):
        raise FormatError(f"{name} holds NaN or infinity in one of the models; train or save it again")


def _is_wide(plan: Extraction, group: Group) -> bool:
    return any(side[name].dtype == "float64" for side in (plan.model, plan.base) for name in group.names)


def _round(factors: tuple[Tensor, Tensor], dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor]:
    """The factors in the dtype of the adapter. Raises PlanError if they overflow there."""
    a, b = (x.to(dtype) for x in factors)
    if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
        kind = str(dtype).removeprefix("torch.")
        raise PlanError(f"{name}: the factors of its change are too large for {kind}; choose another dtype")
    return a, b


def add_group(adapter: NewAdapter, group: Group, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Add the factors of a group to the adapter."""
    if group.kind == "experts":
        adapter.add_experts(group.module, torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs]))
    else:
        add_product(adapter, group, *pairs[0])


def add_product(adapter: NewAdapter, group: Group, a: Tensor, b: Tensor) -> None:
    """Add the product b [out, rank] a [rank, in] for the one matrix of a group to the adapter."""
    if group.kernel:
        a = a.reshape(len(a), -1, *group.kernel)
        b = b.reshape(*b.shape, *(1 for _ in group.kernel))
    adapter.add(group.module, a, b, embedding=group.kind == "embedding")


def threads_for(extractor: Extractor, wanted: int, memory: int, *, stated: bool) -> int:
    """How many matrices to decompose at once. stated: True to raise PlanError if the memory is too small for one."""
    largest = max(extractor.plan.groups, key=extractor.memory, default=None)
    if largest is None:
        return wanted
    nbytes = extractor.memory(largest)
    if stated and nbytes > memory:
        raise PlanError(
            f"found a memory of {format_size(memory)}, expected {format_size(nbytes)} to decompose {largest.name} "
            f"[{largest.out}, {largest.columns}]; give more with --memory, a smaller --rank, or exclude it"
        )
    return max(1, min(wanted, memory // nbytes))
