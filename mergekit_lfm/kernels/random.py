"""Counter-based random numbers: the number of an element depends only on its key and its index.

splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", section 4) of key + (index // 2)
golden-ratio steps gives 64 bits, for two neighbouring elements. So a mask is the same for any chunk, thread, device or
engine, and does not change when another tensor of the recipe does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mergekit_lfm.kernels.constants import constant

if TYPE_CHECKING:
    import torch

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
        return _below(self.keys[i], len(x), self.limits[i])


def _below(key: torch.Tensor, count: int, limits: torch.Tensor) -> torch.Tensor:
    """A mask, int32 [count], of the entries whose numbers are below their limits."""
    import torch

    halves = words(key, (count + 1) // 2).view(torch.int32)  # little-endian: first the even element's
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


class LocalRankedCoins(NamedTuple):
    """Coins for one block: states, int64 [n]; for each input the limits by rank in a row, int32 [row]."""

    keys: torch.Tensor
    limits: tuple[torch.Tensor, ...]

    def mask(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """A mask, int32, of the kept entries of row i of the block, which is whole rows of the tensor."""
        import torch

        limits = self.limits[i]
        order = x.abs().reshape(-1, len(limits)).sort(dim=1, descending=True, stable=True).indices
        each = torch.empty_like(order, dtype=torch.int32).scatter_(1, order, limits.expand(order.shape))
        return _below(self.keys[i], len(x), each.reshape(-1))


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
        import torch

        steps = torch.linspace(1, 0, self.row, dtype=torch.float64) if self.row > 1 else torch.tensor([0.5]).double()
        tables = [low + steps * (high - low) for low, high in self.ends]
        limits = tuple((table * 2**31).round().to(torch.int64).sub(2**30).to(torch.int32) for table in tables)
        return LocalRankedCoins(_states(self.keys, start), limits)
