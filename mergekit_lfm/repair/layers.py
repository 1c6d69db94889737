"""The layers that write hidden units and can shift and scale them, and the moments of their units on data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergekit_lfm.arch.table import Symmetries, Units
from mergekit_lfm.collect.linear import Serials, is_linear, is_transposed
from mergekit_lfm.errors import PlanError
from mergekit_lfm.runtime.batchnorm import batchnorms
from mergekit_lfm.runtime.probe import forward
from mergekit_lfm.runtime.subject import Subject

if TYPE_CHECKING:
    from mergekit_lfm.runtime.batches import Batch

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NOT_CALLED = "not called while the model ran on the data"
LAST = "its outputs are those of the model"
NORMED = "a BatchNorm follows, whose statistics are re-estimated"


@dataclass(frozen=True)
class HiddenLayer:
    """A layer of a module with its name there, and the names of its parameters' tensors in the checkpoint.

    axis: the axis of its units in the weight; output_axis: their axis in its output.
    """

    name: str
    module: nn.Module
    weights: tuple[str, ...]
    biases: tuple[str, ...]
    axis: int
    output_axis: int

    @property
    def units(self) -> int:
        """The number of units that it writes."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return int(weight.shape[self.axis])


def hidden_layers(
    subject: Subject, symmetries: Symmetries | None, batch: Batch
) -> tuple[list[HiddenLayer], dict[str, str]]:
    """The layers whose hidden units can be shifted and scaled, in the order of their first call; and why not others.

    With a table these are the layers whose weights alone write a group of units; skip paths, which several layers add
    to, and heads are left alone. Without one these are all layers but the last to be called. batch: traces the module.
    """
    called, normed = _trace(subject, batch)
    hidden: dict[str, HiddenLayer] = {}
    left: dict[str, str] = {}
    for name, module in _layers(subject.module).items():
        layer: HiddenLayer | str
        layer = NORMED if name in normed else _layer(subject, name, module) if name in called else NOT_CALLED
        if isinstance(layer, HiddenLayer):
            layer = _why_not(layer, symmetries, last=name == called[-1]) or layer
        if isinstance(layer, HiddenLayer):
            hidden[name] = layer
        else:
            left[name] = layer
    return [hidden[name] for name in called if name in hidden], left


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    """All Linear and convolution layers, by name."""
    return {name: m for name, m in module.named_modules() if is_linear(m) or isinstance(m, CONVOLUTIONS)}


def _layer(subject: Subject, name: str, module: nn.Module) -> HiddenLayer | str:
    """The layer, or why it cannot be repaired."""
    weight, bias = module.weight, module.bias
    for what, x in (("weight", weight), ("bias", bias)):
        if x is not None and not isinstance(x, nn.Parameter):
            return f"its {what} is computed from other parameters"
        if x is not None and subject.owners[id(x)] > 1:
            return f"another module uses its {what} too (tied weights)"
    if bias is None:
        return "it has no bias to shift its units with"
    assert isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter)
    weights, biases = subject.tensors_of(weight), subject.tensors_of(bias)
    if not weights or not biases:
        return subject.why_unknown(bias if weights else weight)
    spatial = weight.ndim - 2 if isinstance(module, CONVOLUTIONS) else 0
    axis = 1 if is_transposed(module) else 0
    return HiddenLayer(name, module, tuple(weights), tuple(biases), axis, -1 - spatial)


def _why_not(layer: HiddenLayer, symmetries: Symmetries | None, *, last: bool) -> str:
    """Why a layer does not write hidden units of its own; empty if it does."""
    if symmetries is None:
        return LAST if last else ""
    weight = layer.weights[0]
    if weight not in symmetries.tensors:
        return f"{weight} is not in the symmetry table"
    word = symmetries.tensors[weight][layer.axis]
    group = word[0].group
    if len(word) > 1 or group is None or not isinstance(symmetries.groups[group], Units):
        return f"it writes {'|'.join(map(str, word))}, no units of its own"
    if word[0].view not in ("", "order") or _is_skip_path(symmetries, group):
        return f"it writes {word[0]}, to which other layers add"
    return ""


def _is_skip_path(symmetries: Symmetries, group: str) -> bool:
    """True if a norm reads the group, or several matrices write it."""
    parts = [
        (part, len(axes) > 1)
        for axes in symmetries.tensors.values()
        for axis in axes
        for part in axis
        if part.group == group
    ]
    return any(part.norm for part, _ in parts) or sum(matrix and part.view == "" for part, matrix in parts) > 1


def _trace(subject: Subject, batch: Batch) -> tuple[list[str], set[str]]:
    """The layers called on a batch, in the order of their first call; and those that a BatchNorm reads."""
    serials, writers = Serials(), dict[int, str]()
    called: dict[str, None] = {}
    normed: set[str] = set()

    def wrote(name: str, output: Tensor) -> None:
        called[name] = None
        writers[serials.of(output)] = name

    def read(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and (writer := writers.get(serials.of(args[0]))):
            normed.add(writer)

    handles = [layer.register_forward_pre_hook(read) for layer in batchnorms(subject.module).values()]
    try:
        with listen(_layers(subject.module), wrote), torch.no_grad():
            subject.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return list(called), normed


@contextmanager
def listen(layers: Mapping[str, nn.Module], hear: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call hear(name, output) after every call of a layer."""

    def listener(name: str) -> Callable[..., None]:
        def listen(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            hear(name, output)

        return listen

    handles = [layer.register_forward_hook(listener(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Sums:
    """Sums over all examples and positions of a layer's outputs: the count, and per unit the sum and sum of squares."""

    count: int = 0
    first: Tensor = field(default_factory=lambda: torch.zeros(()))
    second: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, output: Tensor, axis: int) -> None:
        """Add the outputs of a call."""
        rows = output.detach().movedim(axis, -1).flatten(0, -2).double().cpu()  # [examples x positions, units]
        self.count += len(rows)
        self.first, self.second = self.first + rows.sum(0), self.second + (rows * rows).sum(0)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each unit, float64 [units]."""
        mean = self.first / self.count
        return mean, (self.second / self.count - mean * mean).clamp_min(0).sqrt()


LayerMoments = tuple[Tensor, Tensor]  # mean and standard deviation of each unit, float64 [units]


def measure(
    module: nn.Module, layers: Sequence[HiddenLayer], batches: Sequence[Batch], tell: Callable[[Batch], None]
) -> dict[str, LayerMoments]:
    """The moments of the outputs of these layers in the module, over all examples and positions, by name.

    Raises PlanError if the module lacks such a layer, does not call it, or writes values that are not finite or of
    another number of units. tell: called with each batch after it.
    """
    inside = dict(module.named_modules())
    wanted = {layer.name: layer for layer in layers}
    absent = [name for name in wanted if name not in inside]
    if absent:
        raise PlanError(
            f"{type(module).__name__} has no {', '.join(absent)}; expected the layers of the merged model. Give the "
            "models that were merged"
        )
    sums = {name: _Sums() for name in wanted}
    with listen({name: inside[name] for name in wanted}, lambda n, y: sums[n].add(y, wanted[n].output_axis)):
        for batch in batches:
            with torch.inference_mode():
                forward(module, batch)
            tell(batch)
    moments = {name: each.moments() for name, each in sums.items() if each.count}
    wrong = [f"{name}: was not called" for name in wanted if name not in moments]
    wrong += [f"{n}: not finite" for n, (mean, std) in moments.items() if not bool((mean + std).isfinite().all())]
    wrong += [
        f"{n}: {len(mean)} units, the merged model has {wanted[n].units}"
        for n, (mean, _) in moments.items()
        if len(mean) != wanted[n].units
    ]
    if wrong:
        raise PlanError(
            f"layers of {type(module).__name__} give unusable outputs on the data:\n  "
            + "\n  ".join(wrong)
            + "\nExpected finite numbers, and as many units as in the merged model; check the models and the data"
        )
    return moments
