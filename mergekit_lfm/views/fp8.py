"""FP8 weights with scales by blocks, as DeepSeek-V3 has them and transformers saves them.

`X` is float8_e4m3fn [out, in], and `X_scale_inv` has a factor for each block of `weight_block_size` entries, also for
those cut at the edges: a value is its float8 times the factor of its block, in float32. With a block size of null there
is one factor for all.
Source: DeepSeek-V3, inference/kernel.py, weight_dequant; transformers, integrations/finegrained_fp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mergekit_lfm.artifacts.transform import PANEL
from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.store.tensors import ITEMSIZE, TensorSpec
from mergekit_lfm.views.base import ReadRows, Source
from mergekit_lfm.views.dequantised import Quantised

if TYPE_CHECKING:
    from torch import Tensor

QUANTISED = "float8_e4m3fn"
SCALE, ACTIVATIONS = "_scale_inv", "activation_scale"  # ends of names
SCALE_DTYPES = ("float32", "bfloat16", "float16")  # float32 has all their values

Block = tuple[int, int]  # rows, columns
DEFAULT_BLOCK = [128, 128]  # of transformers, where a config names none


@dataclass(frozen=True)
class BlockScaled:
    """Makes a weight from its float8 values and the scales of its blocks. stored, scale: both as they are stored."""

    stored: TensorSpec
    scale: TensorSpec
    block: Block
    whole: bool = False

    @cached_property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.stored.name, self.stored.shape, "float32")

    @property
    def sources(self) -> tuple[Source, Source]:
        return (0, self.stored.name), (0, self.scale.name)

    @cached_property
    def panels(self) -> list[tuple[int, int]]:
        """(first row, last row) of each panel."""
        rows, columns = self.stored.shape
        return list(pairwise([*range(0, rows, max(1, PANEL // max(1, columns))), rows]))

    @property
    def scratch(self) -> int:
        """Bytes for a panel: as float8 and as float32, its scales, and those of a row of entries."""
        columns = self.stored.shape[1]
        rows = max((last - first for first, last in self.panels), default=0)
        blocks = (rows // self.block[0] + 2) * -(-columns // self.block[1])
        return rows * columns * (1 + 4) + blocks * (ITEMSIZE[self.scale.dtype] + 4) + (columns + self.block[1]) * 4

    def rows(self, first: int, last: int, read: ReadRows) -> Tensor:
        """A panel of the weight; of the scales only those of its blocks are read."""
        weight, scale = self.sources
        (height, width), columns = self.block, self.stored.shape[1]
        x = read(weight, first, last).float()
        top, bottom = first // height, -(-last // height)
        scales = read(scale, top, bottom).float().reshape(bottom - top, -1)
        for i, factors in enumerate(scales, top):
            start, stop = max(first, i * height), min(last, (i + 1) * height)
            x[start - first : stop - first] *= factors.repeat_interleave(width)[:columns]
        return x


def read_fp8(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> Quantised:
    """The FP8 weights of a checkpoint with their scales. Raises PlanError with all that does not fit."""
    block, fmt = _block(config), config.get("fmt", "e4m3")
    problems = [] if fmt == "e4m3" else [f"fmt {fmt!r} in its config.json, expected 'e4m3'"]
    makers = dict[str, BlockScaled]()
    for name, spec in tensors.items():
        if spec.dtype.startswith("float8"):
            scale = tensors.get(name + SCALE)
            problem = _problem(spec, scale, block)
            if problem is None and scale is not None:
                makers[name] = BlockScaled(spec, scale, block or (max(1, spec.shape[0]), max(1, spec.shape[1])))
            else:
                problems.append(f"{spec} {problem}")
    scales = {name for name in tensors if name.endswith(SCALE)}
    lone = [name for name in scales if tensors.get(name.removesuffix(SCALE), tensors[name]).dtype != QUANTISED]
    problems += [f"{name} is the scale of no {QUANTISED} tensor" for name in sorted(lone)]
    if problems:
        raise PlanError(several("by fp8 that cannot be read", problems))
    used = {name + SCALE: "the scales of a weight, which is read as float32 with them" for name in makers}
    for name in makers:
        activations = name.rpartition(".")[0] + "." + ACTIVATIONS
        if activations in tensors:
            used[activations] = "a scale of activations, which only quantised arithmetic needs"
    return Quantised(makers, used, {"quant_method": "fp8", "weight_block_size": block and list(block)})


def _block(config: Mapping[str, Any]) -> Block | None:
    """The rows and columns of a block; None for one scale per tensor."""
    size = config.get("weight_block_size", DEFAULT_BLOCK)
    if size is None:
        return None
    match size:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise PlanError(f"weight_block_size {size!r} in its config.json, expected [rows, columns], or null for one scale")


def _problem(spec: TensorSpec, scale: TensorSpec | None, block: Block | None) -> str | None:
    """The reason why a weight cannot be read with its scale; None if it can."""
    if spec.dtype != QUANTISED:
        return f"is not {QUANTISED}"
    if len(spec.shape) != 2:
        return "is not a matrix"
    if scale is None:
        return f"has no {spec.name}{SCALE}"
    if scale.dtype not in SCALE_DTYPES:
        return f"has {scale}, expected one of {', '.join(SCALE_DTYPES)}"
    if block is None:
        return None if scale.numel == 1 else f"has {scale}, expected one number"
    expected = tuple(-(-size // length) for size, length in zip(spec.shape, block, strict=True))
    return None if scale.shape == expected else f"has {scale}, expected {list(expected)} for blocks {list(block)}"
