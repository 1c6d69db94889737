"""The count around an order statistic, in one pass: entries above a bracket, equal to its pivots, and inside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from mergekit_lfm.kernels.constants import constant
from mergekit_lfm.kernels.gpu import launch
from mergekit_lfm.kernels.native.floats import widen

if TYPE_CHECKING:
    from mergekit_lfm.kernels.block import Chunk

TILE = 2048  # elements of a program


@triton.jit  # type: ignore[untyped-decorator]
def _bracket(  # type: ignore[no-untyped-def]
    x, base, pivots, counts, inside, cursor, block, count, PIVOTS: tl.constexpr, BASE: tl.constexpr, TILE: tl.constexpr
):
    """One tile of a block: adds its counts to the block's, and appends the entries inside."""
    number = tl.program_id(1)
    first = number.to(tl.int64) * block
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = (place < block) & (first + place < count)
    kind = pivots.dtype.element_ty
    wide = tl.float32 if kind == tl.int32 else tl.float64
    value = widen(tl.load(x + first + place, mask=live, other=0), wide)
    if BASE:
        value = value - widen(tl.load(base + first + place, mask=live, other=0), wide)
    bits = tl.abs(value).to(kind, bitcast=True)
    top, bottom = tl.load(pivots), tl.load(pivots + PIVOTS - 1)
    rest = live & (bits > bottom) & (bits < top)
    of_block = counts + number * (1 + PIVOTS)
    tl.atomic_add(of_block, tl.sum((live & (bits > top)).to(tl.int32)), sem="relaxed")
    for n in tl.static_range(PIVOTS):
        pivot = tl.load(pivots + n)
        tl.atomic_add(of_block + 1 + n, tl.sum((live & (bits == pivot)).to(tl.int32)), sem="relaxed")
        rest = rest & (bits != pivot)
    if PIVOTS > 1:
        ones = rest.to(tl.int32)
        start = tl.atomic_add(cursor, tl.sum(ones), sem="relaxed")
        tl.store(inside + start + tl.cumsum(ones, 0) - 1, bits, mask=rest)


def bracketed(chunk: Chunk, i: int, pivots: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of `bracket.bracketed`, in one pass over the input; the counts in the processor's memory."""
    x, base = chunk.stored[i], chunk.stored_base
    blocks, each = -(-len(x) // chunk.size), 1 + len(pivots)
    kind = torch.int32 if chunk.dtype == torch.float32 else torch.int64
    counts = torch.zeros(blocks * each + 1, dtype=torch.int32, device=x.device)  # the last: how many are inside
    inside = torch.empty(len(x) if len(pivots) > 1 else 0, dtype=kind, device=x.device)
    launch(
        _bracket,
        (-(-min(chunk.size, len(x)) // TILE), blocks),
        x,
        x if base is None else base,
        constant(tuple(pivots), kind, x.device),
        counts,
        inside,
        counts[-1:],
        chunk.size,
        len(x),
        PIVOTS=len(pivots),
        BASE=base is not None,
        TILE=TILE,
    )
    home = counts.cpu()
    return home[:-1].view(blocks, each), inside[: int(home[-1])]
