"""Counter-based random numbers: the number of an element depends on its key and its index, on nothing else.

splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", the finaliser of section 4) of
key + (index // 2) golden-ratio steps gives 64 bits, for two neighbouring elements. A mask so is the same for any chunk,
thread, device or engine, and does not change when another tensor of the recipe does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    import torch

_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def key(seed: int, tensor: str, position: int) -> int:
    """The 64-bit key of one input of one tensor."""
    return xxhash.xxh3_64_intdigest(f"{seed}\0{position}\0{tensor}".encode())


def bits31(key: int, start: int, count: int) -> torch.Tensor:
    """Uniform integers in [0, 2^31) for the elements start .. start + count, int32 [count].

    In numpy, whose 64-bit products take half the time of torch's here.
    """
    import numpy as np
    import torch

    z = np.arange(start // 2, (start + count + 1) // 2, dtype=np.uint64)
    shifted = np.empty_like(z)
    z *= np.uint64(_GOLDEN)
    z += np.uint64((key + _GOLDEN) & 0xFFFFFFFFFFFFFFFF)
    for shift, mix in ((30, _MIX1), (27, _MIX2), (31, 1)):
        np.right_shift(z, np.uint64(shift), out=shifted)
        z ^= shifted
        if mix != 1:
            z *= np.uint64(mix)
    halves = z.view(np.int32)  # little-endian: the low half is the even element's
    return torch.from_numpy(halves[start % 2 : start % 2 + count]) & 0x7FFFFFFF


def keep(key: int, start: int, count: int, density: float) -> torch.Tensor:
    """A bit mask, int32 [count]: each element kept with probability `density`, to 2^-31."""
    numbers = bits31(key, start, count)
    limit = round(density * 2**31)
    return (numbers - limit) >> 31 if limit < 1 << 31 else numbers.fill_(-1)
