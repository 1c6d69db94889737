"""The count around an order statistic, in one pass: what lies above a bracket, equals its pivots, and is inside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from mergekit_lfm.kernels.gpu import launch
from mergekit_lfm.kernels.native.floats import widened

if TYPE_CHECKING:
    from mergekit_lfm.methods.declare import Chunk

TILE = 2048  # elements of a program


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
    value = widened(tl.load(x + first + place, mask=live, other=0), wide)
    if BASE:
        value = value - widened(tl.load(base + first + place, mask=live, other=0), wide)
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
