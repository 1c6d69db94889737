"""The linear layers of a model, and the inputs that they read while it runs.

Layers that read the very same tensor (queries, keys and values; gate and up projection) have the same moments. A run on
some data finds these layers, and every later batch checks them.
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
from mergekit_lfm.collect.request import FILTERED, select_names
from mergekit_lfm.errors import FormatError
from mergekit_lfm.runtime.subject import Subject

if TYPE_CHECKING:
    from mergekit_lfm.runtime.batches import Batch

NOT_CALLED = "not called while the model ran on the data"
NOT_LINEAR = "not the weight of a Linear layer"
# Layers whose weights cannot be mistaken for those of a linear layer.
OTHER_LAYERS = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)


def is_linear(module: nn.Module) -> bool:
    """True for a Linear, and for transformers' Conv1D, a linear layer whose weight is [in, out]."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """True for transformers' Conv1D, recognised by class name to avoid importing it."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of a model, named in the checkpoint like its weight without ".weight"."""

    module: nn.Module
    weight: str
    bias: str | None
    axis: int  # of the weight, along which the inputs run
    inputs: int

    def described(self, entry: str, count: int) -> Layer:
        """The layer as a statistics file describes it."""
        return Layer(self.weight, self.bias, self.axis, self.inputs, entry, count)


def linear_layers(subject: Subject, patterns: Sequence[str]) -> tuple[dict[str, LinearLayer], dict[str, str]]:
    """The layers with one of the patterns in their name (all without patterns), and why the others are skipped."""
    linear: dict[str, LinearLayer] = {}
    skipped: dict[str, str] = {}
    for name, module in subject.module.named_modules():
        if is_linear(module):
            layers, reason = _find_stored(subject, module)
            if not layers:
                skipped[name] = reason
            linear |= {layer.weight.removesuffix(".weight"): layer for layer in layers}
    wanted = select_names(list(linear), patterns, "linear layer")
    skipped |= dict.fromkeys((name for name in linear if name not in wanted), FILTERED)
    skipped |= dict.fromkeys(_other_matrices(subject), NOT_LINEAR)
    return {name: layer for name, layer in linear.items() if name in wanted}, skipped


def _find_stored(subject: Subject, module: nn.Module) -> tuple[list[LinearLayer], str]:
    """The layer under every name by which it is stored; or no layer, and why."""
    weight, bias = module.weight, module.bias
    if not isinstance(weight, nn.Parameter):
        return [], "its weight is computed from other parameters"
    if bias is not None and not isinstance(bias, nn.Parameter):
        return [], "its bias is computed from other parameters"
    for parameter, role in ((weight, "weight"), (bias, "bias")):
        if subject.owners[id(parameter)] > 1:
            return [], f"another module uses its {role} too (tied weights)"
    tensors = subject.tensors_of(weight)
    biases = [] if bias is None else subject.tensors_of(bias)
    if not tensors:
        return [], subject.why_unknown(weight)
    if bias is not None and not biases:
        return [], subject.why_unknown(bias)
    axis = 0 if is_transposed(module) else 1
    layers = []
    for tensor in tensors:
        sibling = tensor.removesuffix("weight") + "bias"
        own = sibling if sibling in biases else next(iter(biases), None)
        layers.append(LinearLayer(module, tensor, own, axis, weight.shape[axis]))
    return layers, ""


def _other_matrices(subject: Subject) -> list[str]:
    """Parameters of two or more dimensions outside linear layers, embeddings and convolutions."""
    known: set[int] = set()
    for module in subject.module.modules():
        if is_linear(module) or isinstance(module, OTHER_LAYERS):
            known |= {id(parameter) for parameter in module.parameters()}
    others = [(n, p) for n, p in subject.module.named_parameters() if p.dim() > 1 and id(p) not in known]
    return [name for own, parameter in others for name in subject.tensors_of(parameter) or [own]]


class Serials:
    """Numbers tensors: the same object, unchanged in place, has the same number. Keeps no tensor alive."""

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
def listen_to_inputs(
    layers: Mapping[str, LinearLayer], hear: Callable[[str, Tensor], None]
) -> Iterator[dict[str, list[int]]]:
    """Call hear(name, input) whenever a layer is called; yields the serial numbers of the inputs, by layer."""
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


def find_inputs_read(
    subject: Subject, layers: Mapping[str, LinearLayer], data: Sequence[Batch]
) -> dict[str, list[object]]:
    """The numbers of the inputs that each layer read, on as many batches as it takes until every layer was called.

    Layers with equal lists read the same inputs. The list is empty for a layer that no batch calls, or that gets no
    tokens, like an expert to which none are routed.
    """
    read: dict[str, list[object]] = {name: [] for name in layers}
    fed: set[str] = set()

    def note(name: str, x: Tensor) -> None:
        if x.shape[:-1].numel():
            fed.add(name)

    for number, batch in enumerate(data):
        with listen_to_inputs(layers, note) as serials, torch.no_grad():
            subject.run(batch)
        for name, serials_of_layer in serials.items():
            read[name] += [(number, serial) for serial in serials_of_layer]
        if len(fed) == len(layers):
            break
    return {name: serials_of_layer if name in fed else [] for name, serials_of_layer in read.items()}


def check_sharing(groups: Mapping[str, Sequence[str]], read: Mapping[str, list[int]]) -> None:
    """Raises FormatError if layers of a group did not read the inputs of its first layer."""
    different = [name for first, names in groups.items() for name in names if read[name] != read[first]]
    if different:
        raise FormatError(
            f"{', '.join(different)}: read the same inputs as other layers on the first data and different ones later, "
            "expected the same throughout. Collect the statistics of these layers by themselves (`layers`)"
        )
