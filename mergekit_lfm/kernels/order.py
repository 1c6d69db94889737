"""The K largest magnitudes of each input, exactly: K entries, among equals those with the lowest index.

In bfloat16 a fifth of all deltas can be equal, so a threshold alone keeps too many: the cut says up to which index an
entry at the threshold is kept. Both are found by counting digits of the magnitudes' bits, never by sorting.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_lfm.kernels.bits import above, as_integers, magnitude_bits
from mergekit_lfm.kernels.reductions import Digits, Equal, Position, Reduction

if TYPE_CHECKING:
    import torch

    from mergekit_lfm.methods.declare import Block, Unit

DIGITS_32 = ((15, 16), (0, 15))  # (shift, width): 31 bits of a float32's magnitude
DIGITS_64 = ((47, 16), (31, 16), (15, 16), (0, 15))


@dataclass(frozen=True)
class Largest:
    """The K largest: those with bits > threshold, and those with bits == threshold and index < cut."""

    threshold: int
    cut: int

    def mask(self, bits: torch.Tensor, start: int) -> torch.Tensor:
        """A bit mask [m] of the entries among the K largest, in a block that starts at index `start`."""
        import torch

        before = self.cut - start  # entries of the block that are kept if they equal the threshold
        if before <= 0:
            return above(bits, self.threshold)
        if before >= len(bits):
            return above(bits, self.threshold - 1)
        limit = torch.full_like(bits, self.threshold)
        limit[:before] -= 1
        return above(bits, limit)


NONE = Largest(threshold=0x7FFFFFFF, cut=0)  # no finite float32 has these bits, and see `masks`
ALL = Largest(threshold=-1, cut=0)


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


def masks(block: Block, kept: Sequence[tuple[Largest, Largest]]) -> torch.Tensor:
    """Bit masks [n, m] of the entries of input i among the larger set kept[i][0] but not among the smaller
    kept[i][1]."""
    import torch

    result = torch.empty_like(as_integers(block.x))
    for row, x, (outer, inner) in zip(result, block.x, kept, strict=True):
        bits = magnitude_bits(x)
        row.copy_(outer.mask(bits, block.start) if outer is not NONE else torch.zeros_like(bits))
        if inner is not NONE:
            row &= ~inner.mask(bits, block.start)
    return result
