"""The statistics file: measurements of a model's layers and parameters on data, for merges, alignment and edits.

One safetensors file: `gram/LAYER`, `cross/LAYER` or `fisher/TENSOR`, float32, and metadata that name the model and
data, the tensors of the checkpoint that make up each layer, and the layers that share one entry. Collecting them needs
the model; reading them needs this module alone.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lfm.artifacts.header import Kind
from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.tensors import read_header

if TYPE_CHECKING:
    import torch

STATISTICS = Kind("statistics", "mergekit-lfm stats", "collect the statistics again")


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer, y = W x + b, in the names of its checkpoint.

    weight, bias: its tensors; bias may be None. axis: the axis of `weight` along which the inputs run, 1 for a Linear
    [out, in], 0 for a Conv1D [in, out]. inputs: their number, without the appended 1. entry: the layer under whose name
    its moment is stored: itself, or the first that reads the same inputs. count: the tokens that the moment is a mean
    over.
    """

    weight: str
    bias: str | None
    axis: int
    inputs: int
    entry: str
    count: int


@dataclass(frozen=True, slots=True)
class StatisticsInfo:
    """All that a statistics file says about itself.

    models: the content digest (`Checkpoint.content`) of the model, for "cross" of both. data: digest of the batches.
    options: all else that the numbers depend on. layers: for moments, every covered layer; in "cross" with the tensors
    and inputs of the first model. examples: their number. norm: for "fisher", the Euclidean norm over all entries.
    skipped: the layers or parameters that are not covered, and why.
    """

    kind: str
    models: tuple[str, ...]
    data: str
    options: dict[str, Any]
    examples: int
    layers: dict[str, Layer] = field(default_factory=dict)
    norm: float | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """The facts as a safetensors header holds them."""
        rest = {name: value for name, value in asdict(self).items() if name != "kind"}
        return STATISTICS.encode(rest, statistic=self.kind)


def read_statistics_info(metadata: dict[str, str], label: object) -> StatisticsInfo:
    """The facts in a header's metadata. Raises FormatError if they are not those of a statistics file."""

    def build(facts: dict[str, Any]) -> StatisticsInfo:
        layers = {name: Layer(**layer) for name, layer in facts["layers"].items()}
        return StatisticsInfo(
            metadata["lfm.statistic"], **{**facts, "layers": layers, "models": tuple(facts["models"])}
        )

    names = [name for name in StatisticsInfo.__dataclass_fields__ if name != "kind"]
    return STATISTICS.decode(metadata, names, build, label)


@dataclass(frozen=True, repr=False)
class Statistics:
    """An open statistics file: its facts, and its entries as tensors of a checkpoint."""

    path: Path
    info: StatisticsInfo
    tensors: Checkpoint

    def __repr__(self) -> str:
        return f"Statistics({str(self.path)!r}, {self.info.kind}, {len(self.tensors)} entries)"

    @cached_property
    def by_weight(self) -> dict[str, tuple[str, Layer]]:
        """The layers by the names of their weights, each with its own name."""
        return {layer.weight: (name, layer) for name, layer in self.info.layers.items()}

    def entry(self, name: str) -> str:
        """The tensor of this file with the statistic of a layer or parameter. Raises KeyError if it has none."""
        stored = self.info.layers[name].entry if self.info.layers else name
        return self.tensors[f"{self.info.kind}/{stored}"].name

    def entry_of(self, tensor: str) -> str | None:
        """The entry for a tensor of the model: its own, or that of the layer whose weight it is; None without one."""
        if self.info.layers:
            return self.entry(self.by_weight[tensor][0]) if tensor in self.by_weight else None
        name = f"{self.info.kind}/{tensor}"
        return name if name in self.tensors else None

    def read(self, name: str) -> torch.Tensor:
        """The statistic of a layer or parameter, in its shape: a Gram matrix is [inputs + 1, inputs + 1]."""
        entry = self.entry(name)
        return self.tensors.read(entry).view(self.tensors[entry].shape)


def open_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Open a statistics file. Raises FormatError if it is not one, FileNotFoundError if it does not exist."""
    file = STATISTICS.find(path)
    info, tensors = read_statistics_info(read_header(file).metadata, file), open_checkpoint(file)
    wanted = {f"{info.kind}/{layer.entry}" for layer in info.layers.values()}
    if absent := sorted(wanted - tensors.keys()):
        raise FormatError(f"{file} names {absent[0]} but does not hold it; collect the statistics again")
    return Statistics(file, info, tensors)
