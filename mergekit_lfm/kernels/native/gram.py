"""Gram matrices of several inputs, each of which is read once. The kernel is written for the number of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from mergekit_lfm.kernels.gpu import build, launch
from mergekit_lfm.kernels.lanes import LANES

if TYPE_CHECKING:
    from mergekit_lfm.methods.declare import Chunk

SIDE, ROWS = 256, 16  # lanes of a program, and rows whose reads are under way at once
PAIRS = 10  # sums that a program keeps in registers


def lane_products(chunk: Chunk, pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The products of pairs of inputs summed within each lane, float64 [blocks, pairs, LANES]."""
    blocks = -(-chunk.count // chunk.size)
    parts = []
    for first in range(0, len(pairs), PAIRS):
        some = tuple(pairs[first : first + PAIRS])
        inputs = sorted({i for pair in some for i in pair})
        of_them = tuple((inputs.index(i), inputs.index(j)) for i, j in some)
        out = torch.empty(blocks, len(some), LANES, dtype=torch.float64, device=chunk.stored[0].device)
        base = () if chunk.stored_base is None else (chunk.stored_base,)
        kernel = _summing(of_them, bool(base), chunk.dtype == torch.float64)
        launch(
            kernel,
            (LANES // SIDE, blocks),
            *(chunk.stored[i] for i in inputs),
            *base,
            out,
            chunk.size,
            chunk.count,
            -(-min(chunk.size, chunk.count) // (LANES * ROWS)),
            LANES=LANES,
            SIDE=SIDE,
            ROWS=ROWS,
        )
        parts.append(out)
    return torch.cat(parts, 1)


@cache
def _summing(pairs: tuple[tuple[int, int], ...], base: bool, double: bool) -> Any:
    """The kernel that sums the products of these pairs of its inputs in one pass."""
    n, wide = 1 + max(i for pair in pairs for i in pair), "tl.float64" if double else "tl.float32"
    names = [f"p{i}" for i in range(n)] + (["base"] if base else [])
    load = "widened(tl.load({} + first + place, mask=live, other=0), {})".format
    read = [f"x{i} = {load(f'p{i}', wide)}" for i in range(n)]
    if base:
        read = [f"b = {load('base', wide)}", *read, *(f"x{i} = x{i} - b" for i in range(n))]
    products = [f"a{k} += x{i}.to(tl.float64) * x{j}.to(tl.float64)" for k, (i, j) in enumerate(pairs)]
    text = f"""
import triton
import triton.language as tl
from mergekit_lfm.kernels.native.floats import widened


@triton.jit
def kernel({", ".join(names)}, out, block, count, height, LANES: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr):
    lane = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    first = tl.program_id(1).to(tl.int64) * block
    {"; ".join(f"a{k} = tl.zeros((SIDE,), tl.float64)" for k in range(len(pairs)))}
    for step in range(height):
        for row in tl.static_range(ROWS):
            place = (step * ROWS + row) * LANES + lane
            live = (place < block) & (first + place < count)
            {"; ".join(read)}
            {"; ".join(products)}
    to = out + tl.program_id(1).to(tl.int64) * {len(pairs)} * LANES + lane
    {"; ".join(f"tl.store(to + {k} * LANES, a{k})" for k in range(len(pairs)))}
"""
    return build(text, f"gram of {len(pairs)}")
