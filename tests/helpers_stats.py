"""Statistics files for tests of merges, written by hand, like those collected from a running model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mergekit_lfm import open_checkpoint
from mergekit_lfm.artifacts.statistics import Layer, StatisticsInfo

Tensors = dict[str, torch.Tensor]


def write_fisher(path: Path, model: Path, fisher: Mapping[str, torch.Tensor], **changes: Any) -> Path:
    """A Fisher file of the model in a folder."""
    norm = float(torch.cat([x.double().flatten() for x in fisher.values()]).norm())
    facts = StatisticsInfo("fisher", (open_checkpoint(model).content,), "data", {}, examples=1, norm=norm)
    return _write(path, {f"fisher/{name}": x.float() for name, x in fisher.items()}, facts, changes)


def write_grams(
    path: Path, model: Path, grams: Mapping[str, torch.Tensor], layers: Sequence[Layer], **changes: Any
) -> Path:
    """A Gram file of the model in a folder; a layer has its weight's name without the last part."""
    named = {layer.weight.removesuffix(".weight"): layer for layer in layers}
    facts = StatisticsInfo("gram", (open_checkpoint(model).content,), "data", {}, examples=1, layers=named)
    return _write(path, {f"gram/{name}": x.float() for name, x in grams.items()}, facts, changes)


def _write(path: Path, tensors: Tensors, facts: StatisticsInfo, changes: Mapping[str, str]) -> Path:
    save_file(tensors, path, {**facts.metadata(), **changes})
    return path


def gram_of(x: torch.Tensor) -> torch.Tensor:
    """The mean of [x;1][x;1]^T over the rows of x."""
    ones = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    return ones.T @ ones / len(x)
