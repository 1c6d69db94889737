"""Counter-based random numbers: the number of an element depends only on its key and its index.

splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", section 4) of key + (index // 2)
golden-ratio steps gives 64 bits, for two neighbouring elements. So a mask is the same for any chunk, thread, device or
engine, and does not change when another tensor of the recipe does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import is_
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_lfm.kernels.bits import sums_of_magnitudes
from mergekit_lfm.kernels.constants import constant
from mergekit_lfm.kernels.order import by_rank

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mergekit_lfm.kernels.block import Block

    RankedMask = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # as `ranked_mask`
    RankedSums = Callable[[torch.Tensor, Block, int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # ranked_sums

Known = dict[tuple[int, ...], "np.ndarray[Any, Any]"]

LONGEST_KEPT = 1 << 16  # entries of a row whose limits are kept for the next block

_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def key(seed: int, tensor: str, position: int) -> int:
    """The 64-bit key of one input of one tensor."""
    import xxhash  # here, because --help reads the methods' declarations

    return xxhash.xxh3_64_intdigest(f"{seed}\0{position}\0{tensor}".encode())


def _signed(value: int) -> int:
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


def words(key: torch.Tensor, count: int) -> torch.Tensor:
    """The generator's words 1 .. count from the state `key` (an int64 scalar), as int64 [count]."""
    import torch

    z = (torch.arange(1, count + 1, dtype=torch.int64, device=key.device) * _signed(_GOLDEN)) + key
    for shift, mix in ((30, _MIX1), (27, _MIX2)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * _signed(mix)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def words_on_host(key: torch.Tensor, count: int) -> torch.Tensor:
    """`words` in numpy, in place, which takes a third of the time."""
    import numpy as np
    import torch

    z = np.arange(1, count + 1, dtype=np.uint64)
    z *= np.uint64(_GOLDEN)
    z += np.uint64(int(key) & 0xFFFFFFFFFFFFFFFF)
    high = np.empty_like(z)
    for shift, mix in ((30, _MIX1), (27, _MIX2), (31, 1)):
        np.right_shift(z, np.uint64(shift), out=high)
        z ^= high
        if mix != 1:
            z *= np.uint64(mix)
    return torch.from_numpy(z.view(np.int64))


def normal(key: int, count: int) -> torch.Tensor:
    """The first `count` numbers of a normal distribution by the key, float64 [count], up to 8 of either sign."""
    import torch

    z = words(torch.tensor(_signed(key)), count) >> 11  # 53 bits with a sign
    return torch.erfinv((z.double() + 0.5) * 2.0**-52).mul_(2**0.5)


class LocalCoins(NamedTuple):
    """Coins for one block: states, int64 [n]; limits, int32 [n]."""

    keys: torch.Tensor
    limits: torch.Tensor

    def mask(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """A mask, int32, of the kept entries of row i of the block."""
        return _below(words(self.keys[i], (len(x) + 1) // 2), len(x), self.limits[i])


def _below(words: torch.Tensor, count: int, limits: torch.Tensor) -> torch.Tensor:
    """A mask, int32 [count], of the entries whose numbers, two in each word, are below their limits."""
    import torch

    halves = words.view(torch.int32)  # little-endian: first the even element's
    return ((halves[:count] >> 1) - limits) >> 31


def _limit(probability: float) -> int:
    """The limit below which a number is with this probability, to 2^-31."""
    return round(probability * 2**31) - 2**30


def _states(keys: Sequence[int], start: int) -> torch.Tensor:
    """The generators' states, int64 [n], for a block that starts at an even index."""
    import torch

    assert start % 2 == 0
    return torch.tensor([_signed(key + start // 2 * _GOLDEN) for key in keys])


@dataclass(frozen=True)
class Coins:
    """Keeps each entry of input i with probability densities[i], to 2^-31, by the numbers of keys[i]."""

    keys: Sequence[int]
    densities: Sequence[float]

    def at(self, start: int, count: int, dtype: torch.dtype) -> LocalCoins:  # noqa: ARG002
        """The coins of the block that starts at an even index `start`."""
        import torch

        return LocalCoins(_states(self.keys, start), constant(tuple(map(_limit, self.densities)), torch.int32))


class LocalMasks(NamedTuple):
    """Masks that are known, int32 [n, m], for one block: compilers make poor code of int8."""

    masks: torch.Tensor

    def mask(self, i: int, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """A mask of the kept entries of row i of the block."""
        return self.masks[i]


def ranked_mask(key: torch.Tensor, x: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """A mask of the entries of x whose numbers are below the limits of their ranks in rows of len(limits).

    On a GPU int32, else int8, which takes a fourth of the memory.
    """
    import torch

    make = words_on_host if x.is_cpu else words
    mask = _below(make(key, (len(x) + 1) // 2), len(x), by_rank(x, limits))
    return mask.to(torch.int8) if x.is_cpu else mask


def ranked_sums(key: torch.Tensor, block: Block, i: int, limits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`ranked_mask` of input i of a block, and sums of magnitudes: of all entries, and of the kept, float64 [2]."""
    x = block.row(i)
    mask = ranked_mask(key, x, limits)
    return mask, sums_of_magnitudes(x, mask)


class LocalRankedCoins(NamedTuple):
    """Coins for one block: states, int64 [n]; for each input the limits by rank in a row, int32 [row]."""

    keys: torch.Tensor
    limits: tuple[torch.Tensor, ...]

    def mask(self, i: int, x: torch.Tensor, make: RankedMask = ranked_mask) -> torch.Tensor:
        """A mask of the kept entries of row i of the block, which is whole rows of the tensor."""
        return make(self.keys[i], x, self.limits[i])

    def settle(self, block: Block, known: Known | None, make: RankedMask) -> LocalMasks:
        """The masks of a block; from `known` if they are there, else into it."""
        import numpy as np
        import torch

        here = () if known is None else self._place(block)
        if known is not None and here in known:
            kept = np.unpackbits(known[here], axis=1, count=block.count)
            return LocalMasks(torch.from_numpy(kept).view(torch.int8).neg_().int())
        masks = [self.mask(i, block.row(i), make) for i in range(len(block))]
        if known is not None:
            known[here] = _pack(masks)
        return LocalMasks(torch.stack(masks).int())

    def sums(self, block: Block, known: Known | None, make: RankedSums) -> torch.Tensor:
        """Sums of magnitudes of a block before and after its masks, float64 [n, 2]; the masks go into `known`."""
        import torch

        masks, sums = zip(*(make(self.keys[i], block, i, self.limits[i]) for i in range(len(block))), strict=True)
        if known is not None:
            known[self._place(block)] = _pack(masks)
        return torch.stack(sums)

    def _place(self, block: Block) -> tuple[int, ...]:
        """The key of the block's masks among those that are known."""
        return (block.count, *self.keys.tolist())


def _pack(masks: Sequence[torch.Tensor]) -> np.ndarray[Any, Any]:
    """Masks in the processor's memory as bits, a row for each."""
    import numpy as np

    return np.stack([np.packbits(mask.numpy()) for mask in masks])


def settle(local: Any, block: Block, known: Known | None = None, make: RankedMask = ranked_mask) -> Any:
    """Coefficients for one block with masks in place of coins that depend on ranks, so that the rest is elementwise.

    known: masks of a tensor's blocks by their coins, in the processor's memory: takes a bit for each element. make:
    `ranked_mask`, or compiled code in its place.
    """
    if isinstance(local, LocalRankedCoins):
        return local.settle(block, known, make)
    if not isinstance(local, tuple):
        return local
    settled = [settle(item, block, known, make) for item in local]
    if all(map(is_, local, settled)):
        return local
    return type(local)(*settled) if hasattr(local, "_fields") else tuple(settled)


@dataclass(frozen=True)
class RankedCoins:
    """Keeps the larger entries of every row of a tensor more often than the smaller ones.

    ends: for each input the probabilities of a row's smallest and largest entry; between them they grow with the rank.
    Among equals the lowest index counts as the largest. row: elements of a row; one alone is kept with the mean.
    """

    keys: Sequence[int]
    ends: Sequence[tuple[float, float]]
    row: int

    def at(self, start: int, count: int, dtype: torch.dtype) -> LocalRankedCoins:  # noqa: ARG002
        """The coins of the block of whole rows that starts at an even index `start`."""
        return LocalRankedCoins(_states(self.keys, start), tuple(_limits(*ends, self.row) for ends in self.ends))


def _limits(low: float, high: float, row: int) -> torch.Tensor:
    """The limits of a row's entries by their ranks, int32 [row], for these probabilities of the last and the first.

    On torch's default device; those of usual rows are made once for each device and thread.
    """
    import torch

    if row > LONGEST_KEPT:
        return _make_limits(low, high, row)
    return _kept_limits(low, high, row, torch.get_default_device(), get_ident())


@lru_cache(maxsize=64)
def _kept_limits(low: float, high: float, row: int, device: torch.device, thread: int) -> torch.Tensor:  # noqa: ARG001
    return _make_limits(low, high, row)


def _make_limits(low: float, high: float, row: int) -> torch.Tensor:
    import torch

    device = torch.get_default_device()  # said to linspace, which transformers may leave with a default of its own
    steps = torch.linspace(1, 0, row, dtype=torch.float64, device=device) if row > 1 else torch.tensor([0.5]).double()
    table = low + steps * (high - low)
    return (table * 2**31).round().to(torch.int64).sub(2**30).to(torch.int32)
