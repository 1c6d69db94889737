"""The linear layers of a model, and the inputs that they read while it runs.

Layers that read the very same tensor (queries, keys and values; gate and up projection) have the same moments. Which
ones do is found by running the model on some data, and checked on every batch afterwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergekit_lfm.artifacts.statistics import Layer
from mergekit_lfm.collect.request import FILTERED, chosen
from mergekit_lfm.errors import FormatError
from mergekit_lfm.runtime.subject import Subject

if TYPE_CHECKING:
    from mergekit_lfm.runtime.batches import Batch

NOT_CALLED = "not called while the model ran on the data"
NOT_LINEAR = "not the weight of a Linear layer"
# What has weights that nobody takes for those of a linear layer.
OTHER_LAYERS = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a Linear, or a Conv1D of transformers, which is one whose weight is [in, out]."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether the module is a Conv1D of transformers, told by its class so that none has to be imported."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of a model under the name it has in the checkpoint: that of its weight without ".weight"."""

    module: nn.Module
    weight: str
    bias: str | None
    axis: int  # of the weight, along which the inputs run
    inputs: int

    def described(self, entry: str, count: int) -> Layer:
        """The layer as a statistics file describes it."""
        return Layer(self.weight, self.bias, self.axis, self.inputs, entry, count)


def linear_layers(subject: Subject, patterns: Sequence[str]) -> tuple[dict[str, LinearLayer], dict[str, str]]:
    """The layers with one of the patterns in their name (all without patterns), and why the others are left out."""
    found: dict[str, LinearLayer] = {}
    skipped: dict[str, str] = {}
    for name, module in subject.module.named_modules():
        if is_linear(module):
            layers, reason = _stored(subject, module)
            if not layers:
                skipped[name] = reason
            found |= {layer.weight.removesuffix(".weight"): layer for layer in layers}
    wanted = chosen(list(found), patterns, "linear layer")
    skipped |= dict.fromkeys((name for name in found if name not in wanted), FILTERED)
    skipped |= dict.fromkeys(_other_matrices(subject), NOT_LINEAR)
    return {name: layer for name, layer in found.items() if name in wanted}, skipped


def _stored(subject: Subject, module: nn.Module) -> tuple[list[LinearLayer], str]:
    """The layer under every name that it is stored by; or none, and why."""
    weight, bias = module.weight, module.bias
    if not isinstance(weight, nn.Parameter):
        return [], "its weight is computed from other parameters"
    if bias is not None and not isinstance(bias, nn.Parameter):
        return [], "its bias is computed from other parameters"
    for parameter, what in ((weight, "weight"), (bias, "bias")):
        if subject.owners[id(parameter)] > 1:
            return [], f"another module uses its {what} too (tied weights)"
    tensors = subject.tensors_of(weight)
    biases = [] if bias is None else subject.tensors_of(bias)
    if not tensors:
        return [], subject.why_unknown(weight)
    if bias is not None and not biases:
        return [], subject.why_unknown(bias)
    axis = 0 if is_transposed(module) else 1
    found = []
    for tensor in tensors:
        beside = tensor.removesuffix("weight") + "bias"
        own = beside if beside in biases else next(iter(biases), None)
        found.append(LinearLayer(module, tensor, own, axis, weight.shape[axis]))
    return found, ""


def _other_matrices(subject: Subject) -> list[str]:
    """Parameters of two or more dimensions that are neither of a linear layer nor of one that looks up or convolves."""
    known: set[int] = set()
    for module in subject.module.modules():
        if is_linear(module) or isinstance(module, OTHER_LAYERS):
            known |= {id(parameter) for parameter in module.parameters()}
    others = [(n, p) for n, p in subject.module.named_parameters() if p.dim() > 1 and id(p) not in known]
    return [name for own, parameter in others for name in subject.tensors_of(parameter) or [own]]


class Serials:
    """Numbers tensors: the same object, unchanged in place, has the same number. None is kept alive."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self._next = 0

    def of(self, x: Tensor) -> int:
        """The number of x."""
        version = 0 if x.is_inference() else x._version
        ref, seen, serial = self._known.get(id(x), (None, 0, 0))
        if ref is None or ref() is not x or seen != version:
            serial, self._next = self._next, self._next + 1
            self._known[id(x)] = (weakref.ref(x), version, serial)
        return serial


@contextmanager
def listening(layers: Mapping[str, LinearLayer], hear: Callable[[str, Tensor], None]) -> Iterator[dict[str, list[int]]]:
    """Calls hear(name, input) whenever a layer is called; yields the serial numbers of the inputs, by layer."""
    serials, read = Serials(), {name: list[int]() for name in layers}

    def listener(name: str) -> Callable[..., None]:
        def listen(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(iter((*args, *kwargs.values())))
            read[name].append(serials.of(x))
            hear(name, x.detach())

        return listen

    handles = [
        layer.module.register_forward_pre_hook(listener(name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def inputs_read(subject: Subject, layers: Mapping[str, LinearLayer], data: Sequence[Batch]) -> dict[str, list[object]]:
    """Which inputs each layer read, by numbers, on as many batches as it takes until every layer was called.

    Layers with equal lists read the same inputs; an empty list is that of a layer that is not called on any batch, or
    with no tokens alone, as an expert that none is routed to.
    """
    read: dict[str, list[object]] = {name: [] for name in layers}
    fed: set[str] = set()

    def note(name: str, x: Tensor) -> None:
        if x.shape[:-1].numel():
            fed.add(name)

    for number, batch in enumerate(data):
        with listening(layers, note) as serials, torch.no_grad():
            subject.run(batch)
        for name, found in serials.items():
            read[name] += [(number, serial) for serial in found]
        if len(fed) == len(layers):
            break
    return {name: found if name in fed else [] for name, found in read.items()}


def check_sharing(groups: Mapping[str, Sequence[str]], read: Mapping[str, list[int]]) -> None:
    """FormatError where layers of a group did not read the inputs of its first."""
    apart = [name for first, names in groups.items() for name in names if read[name] != read[first]]
    if apart:
        raise FormatError(
            f"{', '.join(apart)}: read the same inputs as other layers on the first data and different ones later, "
            "expected the same throughout. Collect the statistics of these layers by themselves (`layers`)"
        )
