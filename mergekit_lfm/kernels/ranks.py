"""The K largest magnitudes of each input, exactly: K entries, among equals those with the lowest index.

In bfloat16 a fifth of all deltas can be equal, so a threshold alone keeps too many: the cut says up to which index an
entry at the threshold is kept. Both are found by counting digits of the magnitudes' bits, never by sorting.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_lfm.kernels.bits import magnitude_bits, mask_above
from mergekit_lfm.kernels.constants import constant
from mergekit_lfm.kernels.reductions import Reduction
from mergekit_lfm.kernels.selection import (
    COLLECTED,
    FEW,
    SAMPLING_PAYS,
    Key,
    RankValue,
    by_bracket,
    by_digits,
    by_partition,
    cuts,
    of_nonzero,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Largest:
    """The K largest: those with bits > threshold, and those with bits == threshold and index < cut."""

    threshold: int
    cut: int

    def limit(self, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """The limit that kept bits exceed in the `count` entries from `start`: integers [1], or [count] at the cut."""
        import torch

        before = self.cut - start  # entries of the block that are kept if they equal the threshold
        threshold = min(self.threshold, torch.iinfo(dtype).max)
        limit = constant((threshold - (before >= count),), dtype)
        if 0 < before < count:
            limit = limit.repeat(count)
            limit[:before] -= 1
        return limit


NONE = Largest(threshold=(1 << 63) - 1, cut=0)
ALL = Largest(threshold=-1, cut=0)


class LocalRanks(NamedTuple):
    """Ranks for one block: the limits of the larger and of the smaller set of each input."""

    outer: tuple[torch.Tensor, ...]
    inner: tuple[torch.Tensor | None, ...]

    def mask(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """A mask, as wide as x, of the kept entries of row i of the block."""
        bits, inner = magnitude_bits(x), self.inner[i]
        mask = mask_above(bits, self.outer[i])
        return mask if inner is None else mask & ~mask_above(bits, inner)


@dataclass(frozen=True)
class Ranks:
    """Keeps the entries of input i in the larger set bands[i][0] and not in the smaller set bands[i][1]."""

    bands: Sequence[tuple[Largest, Largest]]

    def at(self, start: int, count: int, dtype: torch.dtype) -> LocalRanks:
        """The limits in the block of `count` entries from index `start`, for floats of `dtype`."""
        import torch

        wide = torch.int32 if dtype == torch.float32 else torch.int64
        return LocalRanks(
            tuple(outer.limit(start, count, wide) for outer, _ in self.bands),
            tuple(None if inner is NONE else inner.limit(start, count, wide) for _, inner in self.bands),
        )


def largest(
    numel: int,
    counts: Sequence[Sequence[int]],
    *,
    double: bool,
    exact: bool = True,
    few: int = FEW,
    sampling_pays: int = SAMPLING_PAYS,
    collected: int = COLLECTED,
) -> Generator[Reduction, Any, list[list[Largest]]]:
    """The counts[i][k] largest magnitudes of each input i, of `numel` entries, as thresholds.

    double: the entries are float64, else float32. exact=False keeps all that equal the threshold (the convention of the
    TIES authors' code). K <= 0 keeps nothing, K >= numel everything, at no cost. few, sampling_pays, collected: choose
    the way to the same result, see `kernels.selection`.
    """
    sets = [[ALL if count >= numel else NONE for count in row] for row in counts]
    ranks = {(i, k): c for i, row in enumerate(counts) for k, c in enumerate(row) if 0 < c < numel}
    found = yield from _find(numel, len(counts), ranks, double, few, sampling_pays, collected)
    for key, at in (yield from cuts(found, exact)).items():
        sets[key[0]][key[1]] = Largest(found[key].bits, numel if at is None else at)
    return sets


def largest_of_nonzero(
    numel: int,
    share: float,
    *,
    double: bool,
    sampling_pays: int = SAMPLING_PAYS,
    collected: int = COLLECTED,
) -> Generator[Reduction, Any, Largest]:
    """The int(share * c) largest magnitudes of the first input, of whose `numel` entries c are not 0; share below 1.

    Else as of `largest`.
    """
    rank, value = yield from of_nonzero(numel, share, sampling_pays=sampling_pays, collected=collected)
    if not rank:
        return NONE
    found = {(0, 0): value} if value is not None else (yield from by_digits(1, {(0, 0): rank}, double))
    cut = (yield from cuts(found, exact=True))[0, 0]
    return Largest(found[0, 0].bits, numel if cut is None else cut)


def magnitudes_of(
    numel: int, ranks: Sequence[Sequence[int]], *, double: bool
) -> Generator[Reduction, Any, list[list[float]]]:
    """The magnitudes of ranks[i][k], from 1, the largest, to `numel`, the smallest, of each input i."""
    wanted = {(i, k): rank for i, row in enumerate(ranks) for k, rank in enumerate(row)}
    found = yield from _find(numel, len(ranks), wanted, double, FEW, SAMPLING_PAYS, COLLECTED)
    form = "qd" if double else "if"
    return [
        [struct.unpack(form[1], struct.pack(form[0], found[i, k].bits))[0] for k in range(len(row))]
        for i, row in enumerate(ranks)
    ]


def _find(
    numel: int, inputs: int, ranks: Mapping[Key, int], double: bool, few: int, sampling_pays: int, collected: int
) -> Generator[Reduction, Any, dict[Key, RankValue]]:
    """The values of the ranks: of few entries by a partition, else by the bracket, and what is left by digits."""
    if numel <= few * (1 + double):  # a float64 has twice as many digits to count
        found = yield from by_partition(ranks)
    else:
        found = yield from by_bracket(numel, ranks, sampling_pays=sampling_pays, collected=collected)
    found |= yield from by_digits(inputs, {key: rank for key, rank in ranks.items() if key not in found}, double)
    return found
