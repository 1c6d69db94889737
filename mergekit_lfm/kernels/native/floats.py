"""Floats in kernels."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def widen(x, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    """x as the type of the arithmetic. bfloat16 by its bits: Triton's interpreter loses subnormal ones."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True).to(kind)
    return x.to(kind)
