"""The formats of quantised checkpoints that can be read. To add one: a reader in a file of its own, and its row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.views.dequantised import Dequantised, Quantised
from mergekit_lfm.views.fp8 import read_fp8

# From the config's quantization_config and the tensors to what is quantised. Raises PlanError with all it cannot read.
Reader = Callable[[Mapping[str, Any], Mapping[str, TensorSpec]], Quantised]

FORMATS: Mapping[str, Reader] = MappingProxyType({"fp8": read_fp8})  # by quant_method


def dequantise(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with float32 in place of quantised tensors; itself if it has none.

    Raises PlanError with the reason why it cannot be read.
    """
    of_mlx = checkpoint.config.get("quantization")
    config = checkpoint.config.get("quantization_config") or (of_mlx if isinstance(of_mlx, Mapping) else None)
    float8 = next((spec for spec in checkpoint.values() if spec.dtype.startswith("float8")), None)
    if not config and float8 is None:
        return checkpoint
    if not config:
        raise PlanError(f"{float8}, but its config.json has no quantization_config, which says how to read it")
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    reader = FORMATS.get(str(method))
    if reader is None:
        raise PlanError(f"quant_method {method!r} in its config.json; can be read: {', '.join(FORMATS)}")
    return Dequantised(checkpoint, reader(config, checkpoint))
