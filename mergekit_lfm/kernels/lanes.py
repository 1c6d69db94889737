"""Float64 sums on a device, in an order that does not change with the chunk, the device or the kernel.

Element e of a block belongs to lane e % LANES. Lanes are summed one row after the other, then the upper half of them is
added to the lower half until one is left: additions of single elements, which every device rounds alike. A processor
sums blocks in its own, faster order, so that its sums differ from these by rounding, about 1e-14.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_lfm.kernels.block import LANES

if TYPE_CHECKING:
    import torch

    from mergekit_lfm.kernels.block import Chunk


def sums(parts: Sequence[torch.Tensor], size: int, native: bool) -> torch.Tensor:
    """The sums of tensors [m] over every block of `size` elements (the last may be shorter): [blocks, parts].

    float64. native: use the kernel, not torch's operations.
    """
    import torch

    if native and len(parts[0]):
        from mergekit_lfm.kernels.native.sums import lane_sums

        return fold_lanes(lane_sums(parts, size))
    return torch.stack([fold_lanes(_added_rows((x.double(),), size)) for x in parts], 1)


def grams(chunk: Chunk) -> torch.Tensor:
    """Inner products of the inputs in every block of a chunk, float64 [blocks, n, n]."""
    import torch

    n = len(chunk)
    pairs = [(i, j) for i in range(n) for j in range(i + 1)]
    if chunk.native and chunk.count:
        from mergekit_lfm.kernels.native.sums import lane_products

        lanes = lane_products(chunk, pairs)
    else:
        rows = [chunk.row(k).double() for k in range(n)]
        lanes = torch.stack([_added_rows((rows[a], rows[b]), chunk.size) for a, b in pairs], 1)
    found = dict(zip(pairs, fold_lanes(lanes).unbind(1), strict=True))
    return torch.stack([torch.stack([found[max(i, j), min(i, j)] for j in range(n)], -1) for i in range(n)], -2)


def _added_rows(factors: tuple[torch.Tensor, ...], block: int) -> torch.Tensor:
    """The products of the factors [m], or the one factor, summed within each lane: [blocks, LANES]."""
    import torch

    count = len(factors[0])
    blocks, height = -(-count // block), max(1, -(-min(block, count) // LANES))
    grids = [_grid(x, blocks, block, height) for x in factors]
    total = torch.zeros_like(grids[0][:, 0])
    for row in range(height):
        term = grids[0][:, row]
        for grid in grids[1:]:
            term = term * grid[:, row]
        total += term
    return total


def _grid(x: torch.Tensor, blocks: int, block: int, height: int) -> torch.Tensor:
    """x [m] as [blocks, height, LANES], zeros beyond its end and that of every block."""
    import torch

    whole = x if len(x) == blocks * block else torch.nn.functional.pad(x, (0, blocks * block - len(x)))
    rows = whole.view(blocks, block)
    if height * LANES > block:
        rows = torch.nn.functional.pad(rows, (0, height * LANES - block))
    return rows[:, : height * LANES].view(blocks, height, LANES)


def fold_lanes(lanes: torch.Tensor) -> torch.Tensor:
    """The sum over the last axis, of LANES entries."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]
