"""The sites where a model can be edited: each layer's MLP down-projection, as the architecture's table names it.

The table also names the axis of the inputs: the shape never decides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mergekit_lfm.arch.registry import ARCHITECTURES
from mergekit_lfm.arch.table import Units
from mergekit_lfm.errors import PlanError


@dataclass(frozen=True)
class Site:
    """The down-projection of one layer. weight: its name in the model; axis: of its inputs, 1 for [out, in].

    projection, mlp, block: the modules that contain the weight, each within the next. attention: of the same block.
    """

    layer: int
    weight: str
    axis: int
    projection: nn.Module
    mlp: nn.Module
    attention: nn.Module
    block: nn.Module
    inputs: int
    outputs: int

    @property
    def parameter(self) -> Tensor:
        """The weight, in its stored orientation."""
        weight: Tensor = self.projection.weight  # type: ignore[assignment]
        return weight

    def as_stored(self, change: Tensor) -> Tensor:
        """A change [out, in] in the orientation of the weight."""
        return change if self.axis == 1 else change.mT


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """The site of every layer, in order. Raises PlanError if the architecture has no table or no such layers."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    build = ARCHITECTURES.get(kind or "")
    if build is None or config is None:
        raise PlanError(
            f"the model has model_type {kind!r}, expected one of {', '.join(sorted(ARCHITECTURES))}, whose layers that "
            "store facts are known. Choose such a model"
        )
    if not getattr(model, "can_generate", lambda: False)():
        raise PlanError(
            f"{type(model).__name__} does not generate text, expected a decoder that predicts the next token, such as "
            "a ...ForCausalLM. Load it as one"
        )
    names = [name for name, _ in model.named_parameters()]
    table = build(config.to_dict(), names)
    sites = []
    for layer in range(len(table.groups)):
        group = table.groups.get(f"ffn.{layer}")
        if not isinstance(group, Units):
            break
        projections = [(name, axis) for name, axis in table.uses(f"ffn.{layer}") if _reads(table.tensors[name][axis])]
        heads = [name for name, axis in table.uses(f"heads.{layer}") if table.tensors[name][axis][0].view == "output"]
        if len(projections) == len(heads) == 1 and projections[0][0] in names:
            sites.append(_site(model, layer, *projections[0], heads[0]))
    if not sites or not any(name.endswith(".weight") for name in names):
        raise PlanError(
            f"a model of model_type {kind!r} has no layers with one down-projection each, expected a decoder with "
            "dense MLPs. Choose such a model; mixtures of experts cannot be edited"
        )
    return tuple(sites)


def _reads(axis: Sequence[Any]) -> bool:
    """True if the axis holds only the inputs of a weight that reads the hidden units."""
    return len(axis) == 1 and axis[0].view == "'"


def _site(model: nn.Module, layer: int, weight: str, axis: int, heads: str) -> Site:
    path = weight.removesuffix(".weight")
    parts = path.split(".")
    depth = parts.index(str(layer)) + 1
    block = ".".join(parts[:depth])
    projection = model.get_submodule(path)
    shape = projection.weight.shape
    assert isinstance(shape, tuple)
    return Site(
        layer,
        weight,
        axis,
        projection,
        model.get_submodule(path.rpartition(".")[0]),
        model.get_submodule(f"{block}.{heads.split('.')[depth]}"),
        model.get_submodule(block),
        shape[axis],
        shape[1 - axis],
    )
