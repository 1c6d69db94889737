"""The K largest magnitudes of each input, exactly: K entries, among equals those with the lowest index.

In bfloat16 a fifth of all deltas can be equal, so a threshold alone keeps too many: the cut says up to which index an
entry at the threshold is kept. Both are found by counting digits of the magnitudes' bits, never by sorting.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_lfm.kernels.bits import above, magnitude_bits
from mergekit_lfm.kernels.reductions import Digits, Equal, Position, Reduction

if TYPE_CHECKING:
    import torch

    from mergekit_lfm.methods.declare import Unit

DIGITS_32 = ((15, 16), (0, 15))  # (shift, width): 31 bits of a float32's magnitude
DIGITS_64 = ((47, 16), (31, 16), (15, 16), (0, 15))


@dataclass(frozen=True)
class Largest:
    """The K largest: those with bits > threshold, and those with bits == threshold and index < cut."""

    threshold: int
    cut: int

    def limit(self, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """What bits must exceed in a block of `count` entries from index `start`: integers [1], or [count] at the
        cut."""
        import torch

        before = self.cut - start  # entries of the block that are kept if they equal the threshold
        threshold = min(self.threshold, torch.iinfo(dtype).max)
        limit = torch.tensor([threshold - (before >= count)], dtype=dtype)
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
        mask = above(bits, self.outer[i])
        return mask if inner is None else mask & ~above(bits, inner)


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
    unit: Unit, counts: Sequence[Sequence[int]], *, exact: bool = True
) -> Generator[Reduction, Any, list[list[Largest]]]:
    """The counts[i][k] largest magnitudes of each input i, as thresholds. counts has the same number of entries per
    input.

    exact=False keeps all that equal the threshold (the convention of the TIES authors' code). K <= 0 keeps nothing,
    K >= numel everything, at no cost.
    """
    found = [[ALL if k >= unit.numel else NONE for k in row] for row in counts]
    wanted = [(i, k) for i, row in enumerate(counts) for k, count in enumerate(row) if 0 < count < unit.numel]
    if not wanted:
        return found
    rank = {(i, k): counts[i][k] for i, k in wanted}  # how many of the remaining candidates are kept
    prefix = dict.fromkeys(wanted, 0)
    equal = dict.fromkeys(wanted, unit.numel)
    prefixes = None
    for shift, width in DIGITS_64 if unit.double else DIGITS_32:
        histogram = yield Digits(shift, width, prefixes)
        for i, k in wanted:
            row = histogram[i, 0 if prefixes is None else k]
            above = row.flip(0).cumsum(0)  # entries in the top 1, 2, ... bins
            top = int((above < rank[i, k]).sum())
            digit = len(row) - 1 - top
            equal[i, k] = int(row[digit])
            rank[i, k] -= int(above[top]) - equal[i, k]
            prefix[i, k] = prefix[i, k] << width | digit
        prefixes = tuple(tuple(prefix.get((i, k), -1) for k in range(len(row))) for i, row in enumerate(counts))
    for i, k in wanted:
        found[i][k] = Largest(threshold=prefix[i, k], cut=unit.numel)
    split = [key for key in wanted if exact and rank[key] < equal[key]]
    if split:
        yield from _cuts(found, {key: rank[key] for key in split}, equal)
    return found


def _cuts(
    found: list[list[Largest]], rank: dict[tuple[int, int], int], equal: dict[tuple[int, int], int]
) -> Generator[Reduction, Any, None]:
    """Set the cuts where only the first rank[i, k] of the entries at the threshold are kept."""
    per_block = yield Equal(tuple(tuple(e.threshold for e in row) for row in found))
    for (i, k), ordinal in rank.items():
        running = per_block[i, k].cumsum(0)
        assert int(running[-1]) == equal[i, k]
        block = int((running < ordinal).sum())
        before = int(running[block - 1]) if block else 0
        threshold = found[i][k].threshold
        cut = yield Position(i, threshold, ordinal - before, only=(block,))
        found[i][k] = Largest(threshold, cut)
