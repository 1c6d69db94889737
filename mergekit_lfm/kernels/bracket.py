"""One pass over a chunk on a device: count the entries above a bracket and at its pivots, collect those inside it.

The order of the entries inside does not matter, only their values. Counts are integers, hence exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_lfm.kernels.bits import bits_of

if TYPE_CHECKING:
    import torch

    from mergekit_lfm.kernels.block import Chunk


def count_bracket(chunk: Chunk, i: int, pivots: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """For the bits of |x|, x being row i of the chunk: counts [blocks, 1 + pivots], and the bits inside, in any order.

    pivots: descending, the first and the last are the bracket's ends. The first count is of the bits above it, the
    others of the bits equal to each pivot. Bits inside lie between the ends and equal no pivot.
    """
    if chunk.native and chunk.count:
        from mergekit_lfm.kernels.native import bracket

        return bracket.bracketed(chunk, i, pivots)
    bits = bits_of(chunk, i)
    inside = (bits > pivots[-1]) & (bits < pivots[0])
    masks = [bits > pivots[0]]
    for pivot in pivots:
        masks.append(bits == pivot)
        inside &= ~masks[-1]
    return by_block(masks, chunk.size), bits[inside]


def by_block(masks: Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """Count the true entries in every block of `size` entries (the last may be shorter): int64 [blocks, masks]."""
    import torch

    missing = -len(masks[0]) % size
    whole = [torch.nn.functional.pad(mask, (0, missing)) if missing else mask for mask in masks]
    return torch.stack([mask.view(-1, size).sum(1) for mask in whole], 1)
