"""Sums, and sums of products, of several tensors, reading each once. Each form gets its own kernel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from mergekit_lfm.kernels.block import LANES
from mergekit_lfm.kernels.gpu import build, launch

if TYPE_CHECKING:
    from mergekit_lfm.kernels.block import Chunk

SIDE, ROWS = 256, 16  # lanes of a program, and rows whose reads are under way at once
TERMS = 10  # sums that a program keeps in registers


def lane_products(chunk: Chunk, pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The products of pairs of inputs summed within each lane, float64 [blocks, pairs, LANES]."""
    return _in_lanes(chunk.stored, chunk.stored_base, pairs, chunk.size, chunk.dtype)


def lane_sums(parts: Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """Tensors [m] summed within each lane of blocks of `size` elements, float64 [blocks, parts, LANES]."""
    return _in_lanes(parts, None, [(i,) for i in range(len(parts))], size, parts[0].dtype)


def _in_lanes(
    inputs: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    terms: Sequence[tuple[int, ...]],
    size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The products of the inputs of each term, less the base in `dtype`, summed within each lane."""
    count, parts = len(inputs[0]), []
    blocks = -(-count // size)
    for first in range(0, len(terms), TERMS):
        some = terms[first : first + TERMS]
        used = sorted({i for term in some for i in term})
        out = torch.empty(blocks, len(some), LANES, dtype=torch.float64, device=inputs[0].device)
        kernel = _summing(
            tuple(tuple(used.index(i) for i in term) for term in some), base is not None, dtype == torch.float64
        )
        launch(
            kernel,
            (LANES // SIDE, blocks),
            *(inputs[i] for i in used),
            *(() if base is None else (base,)),
            out,
            size,
            count,
            -(-min(size, count) // (LANES * ROWS)),
            LANES=LANES,
            SIDE=SIDE,
            ROWS=ROWS,
        )
        parts.append(out)
    return torch.cat(parts, 1)


@cache
def _summing(terms: tuple[tuple[int, ...], ...], base: bool, double: bool) -> Any:
    """The kernel that sums the products of its inputs in these terms in one pass."""
    n, wide = 1 + max(i for term in terms for i in term), "tl.float64" if double else "tl.float32"
    names = [f"p{i}" for i in range(n)] + (["base"] if base else [])
    load = "widen(tl.load({} + first + place, mask=live, other=0), {})".format
    read = [f"x{i} = {load(f'p{i}', wide)}" for i in range(n)]
    if base:
        read = [f"b = {load('base', wide)}", *read, *(f"x{i} = x{i} - b" for i in range(n))]
    sums = [f"a{k} += {' * '.join(f'x{i}.to(tl.float64)' for i in term)}" for k, term in enumerate(terms)]
    text = f"""
import triton
import triton.language as tl
from mergekit_lfm.kernels.native.floats import widen


@triton.jit
def kernel({", ".join(names)}, out, block, count, height, LANES: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr):
    lane = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    first = tl.program_id(1).to(tl.int64) * block
    {"; ".join(f"a{k} = tl.zeros((SIDE,), tl.float64)" for k in range(len(terms)))}
    for step in range(height):
        for row in tl.static_range(ROWS):
            place = (step * ROWS + row) * LANES + lane
            live = (place < block) & (first + place < count)
            {"; ".join(read)}
            {"; ".join(sums)}
    to = out + tl.program_id(1).to(tl.int64) * {len(terms)} * LANES + lane
    {"; ".join(f"tl.store(to + {k} * LANES, a{k})" for k in range(len(terms)))}
"""
    return build(text, f"sums of {len(terms)}")
