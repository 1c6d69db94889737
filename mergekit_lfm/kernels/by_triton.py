"""Kernels written for a GPU, where torch's operations pass over memory several times. Triton is imported with this.

Each is tested against its formula in torch, `bracket.bracketed` and `lanes.grams`, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from mergekit_lfm.kernels.gpu import build, launch
from mergekit_lfm.kernels.lanes import LANES

if TYPE_CHECKING:
    from mergekit_lfm.methods.declare import Chunk

TILE = 2048  # elements of a program that counts
SIDE, ROWS = 256, 16  # lanes of a program that sums, and rows whose reads are under way at once
PAIRS = 10  # sums that a program keeps in registers


@triton.jit  # type: ignore[untyped-decorator]
def _widened(x, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    """x as the type of the arithmetic. bfloat16 by its bits: Triton's interpreter loses subnormal ones."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True).to(kind)
    return x.to(kind)


@triton.jit  # type: ignore[untyped-decorator]
def _bracket(  # type: ignore[no-untyped-def]
    x, base, pivots, counts, inside, cursor, block, count, PIVOTS: tl.constexpr, BASE: tl.constexpr, TILE: tl.constexpr
):
    """One tile of a block: its counts are added to the block's, and what is inside is appended."""
    number = tl.program_id(1)
    first = number.to(tl.int64) * block
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = (place < block) & (first + place < count)
    kind = pivots.dtype.element_ty
    wide = tl.float32 if kind == tl.int32 else tl.float64
    value = _widened(tl.load(x + first + place, mask=live, other=0), wide)
    if BASE:
        value = value - _widened(tl.load(base + first + place, mask=live, other=0), wide)
    bits = tl.abs(value).to(kind, bitcast=True)
    top, bottom = tl.load(pivots), tl.load(pivots + PIVOTS - 1)
    rest = live & (bits > bottom) & (bits < top)
    of_block = counts + number * (1 + PIVOTS)
    tl.atomic_add(of_block, tl.sum((live & (bits > top)).to(tl.int32)))
    for n in tl.static_range(PIVOTS):
        pivot = tl.load(pivots + n)
        tl.atomic_add(of_block + 1 + n, tl.sum((live & (bits == pivot)).to(tl.int32)))
        rest = rest & (bits != pivot)
    ones = rest.to(tl.int32)
    start = tl.atomic_add(cursor, tl.sum(ones))
    tl.store(inside + start + tl.cumsum(ones, 0) - 1, bits, mask=rest)


def bracketed(chunk: Chunk, i: int, pivots: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What `bracket.bracketed` returns, in one pass over the input."""
    x, base = chunk.stored[i], chunk.stored_base
    blocks = -(-len(x) // chunk.size)
    kind = torch.int32 if chunk.dtype == torch.float32 else torch.int64
    counts = torch.zeros(blocks, 1 + len(pivots), dtype=torch.int32, device=x.device)
    inside = torch.empty(len(x), dtype=kind, device=x.device)
    cursor = torch.zeros(1, dtype=torch.int32, device=x.device)
    given = torch.tensor(pivots, dtype=kind, device=x.device)
    launch(
        _bracket,
        (-(-min(chunk.size, len(x)) // TILE), blocks),
        x,
        x if base is None else base,
        given,
        counts,
        inside,
        cursor,
        chunk.size,
        len(x),
        PIVOTS=len(pivots),
        BASE=base is not None,
        TILE=TILE,
    )
    return counts, inside[: int(cursor)]


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
from mergekit_lfm.kernels.by_triton import _widened as widened


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
