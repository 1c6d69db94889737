"""Chains of layers, found in the tensors alone: perceptrons, and plain convolutional networks with BatchNorm.

Each layer reads what the one before it writes, and no other. The order comes from the sizes, among equals from the
numbers in the names. A file does not say which activation lies between: the units may change places, and no more.
Nor does it show skip connections or grouped convolutions: a model that has them needs a table of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise

from mergekit_lfm.arch.table import FREE, Group, Part, Symmetries, Units
from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.tensors import TensorSpec

_INPUT, _OUTPUT, _KERNEL = (Part(None, free=word) for word in ("input", "class", "kernel"))
_STATISTICS = ("running_mean", "running_var")
_MOST = 1000  # orders that are looked at; more of them are as good as none


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer by its name, with its tensors by the last word of theirs."""

    name: str
    tensors: dict[str, TensorSpec] = field(default_factory=dict)

    @property
    def norm(self) -> bool:
        return "running_mean" in self.tensors

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors["running_mean" if self.norm else "weight"].shape

    @property
    def kind(self) -> str:
        """The name without its numbers: what layers share that are told apart by number."""
        return re.sub(r"\d+", "#", self.name)

    @property
    def numbers(self) -> list[int]:
        return [int(digits) for digits in re.findall(r"\d+", self.name)]

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]


def chain(specs: Mapping[str, TensorSpec]) -> Symmetries:
    """The table of a chain of layers: every hidden layer's units are a group with the layer's name.

    Linear layers [out, in], convolutions [out, in, ...] and BatchNorms, with or without biases. After a convolution a
    linear layer may read several entries of each channel, as after flattening. PlanError where the tensors form no
    chain, or more than one.
    """
    layers = _layers(specs)
    norms = [layer for layer in layers if layer.norm]
    order = _order([layer for layer in layers if not layer.norm])
    homes = {layer.name: layer.name for layer in order} | {norm.name: _home(norm, order) for norm in norms}
    names = {layer.name: f"{layer.name}.units" if layer.name in FREE else layer.name for layer in order[:-1]}
    groups: dict[str, Group] = {names[layer.name]: Units(layer.shape[0]) for layer in order[:-1]}
    reads = {order[0].name: _INPUT} | {after.name: Part(names[layer.name], "'") for layer, after in pairwise(order)}
    tensors: dict[str, tuple[tuple[Part, ...], ...]] = {}
    for layer in layers:
        home = homes[layer.name]
        written = _INPUT if home is None else Part(names[home]) if home in names else _OUTPUT
        undone = not layer.norm and layer.name in (homes[norm.name] for norm in norms)  # by the norm that follows
        ordered = Part(written.group, "order") if written.group else written
        for last, spec in layer.tensors.items():
            first = ordered if last in _STATISTICS or undone else written
            others = [reads[layer.name], *[_KERNEL] * (len(spec.shape) - 2)] if len(spec.shape) > 1 else []
            tensors[spec.name] = tuple((part,) for part in ([first, *others] if spec.shape else []))
    return Symmetries(groups, {name: tensors[name] for name in specs})


def _layers(specs: Mapping[str, TensorSpec]) -> list[_Layer]:
    """The layers in the order of their first tensors. PlanError about all tensors that are in none."""
    layers: dict[str, _Layer] = {}
    for name, spec in specs.items():
        place, _, last = name.rpartition(".")
        layers.setdefault(place, _Layer(place)).tensors[last] = spec
    problems = [problem for layer in layers.values() for problem in _problems(layer)]
    if problems or all(layer.norm for layer in layers.values()):
        found = _few(problems, "; ") or "none of them is a weight"
        raise PlanError(f"the tensors form no chain of linear layers, convolutions and BatchNorms: {found}")
    return list(layers.values())


def _problems(layer: _Layer) -> list[str]:
    """The tensors that a linear layer, a convolution or a BatchNorm has not."""
    known: Mapping[str, tuple[int, ...]]
    if layer.norm:
        size = layer.shape
        known = dict.fromkeys(("weight", "bias", *_STATISTICS), size) | {"num_batches_tracked": ()}
        return [str(spec) for last, spec in layer.tensors.items() if known.get(last) != spec.shape or not layer.name]
    weight = layer.tensors.get("weight")
    if weight is None or not 2 <= len(weight.shape) <= 5:
        return [str(spec) for spec in layer.tensors.values()]
    known = {"weight": weight.shape, "bias": weight.shape[:1]}
    return [str(spec) for last, spec in layer.tensors.items() if known.get(last) != spec.shape or not layer.name]


def _few(words: list[str], between: str) -> str:
    return between.join(words[:8]) + (f"{between}and {len(words) - 8} more" if len(words) > 8 else "")


def _follows(before: _Layer, after: _Layer) -> bool:
    """Whether a layer can read the units of another: as many, or several entries for each after flattening."""
    units, inputs = before.shape[0], after.shape[1]
    flattened = len(before.shape) > 2 and len(after.shape) == 2
    return inputs % units == 0 if flattened else inputs == units


def _order(layers: list[_Layer]) -> list[_Layer]:
    """The layers from the input to the output. PlanError where there is no such order, or more than one is as good."""
    found = list(islice(_orders(layers), _MOST))
    whole = [order for order in found if _unbroken(order)] if len(found) > 1 else found
    if len(whole) > 1 and layers != sorted(layers, key=lambda layer: layer.name):
        whole = [order for order in whole if order == layers]  # not sorted by name: as the model has them
    if len(whole) == 1 and len(found) < _MOST:
        return whole[0]
    shapes = _few([f"{layer.name} {list(layer.shape)}" for layer in layers], ", ")
    if not found:
        raise PlanError(f"the layers form no chain in which each reads what the one before it writes: {shapes}")
    raise PlanError(f"neither sizes nor numbers tell the order of these layers: {shapes}")


def _orders(layers: list[_Layer]) -> Iterator[list[_Layer]]:
    """All orders in which each layer follows the one before, and layers that differ by number stand by it."""
    kinds: dict[str, list[_Layer]] = {}
    for layer in sorted(layers, key=lambda layer: layer.numbers):
        kinds.setdefault(layer.kind, []).append(layer)

    dead = set()

    def extended(order: list[_Layer], left: list[Sequence[_Layer]]) -> Iterator[list[_Layer]]:
        if not left:
            yield order
            return
        state = (order[-1].name if order else "", *(rest[0].name for rest in left))
        if state in dead:
            return
        complete = False
        for i, (first, *others) in enumerate(left):
            if not order or _follows(order[-1], first):
                rest = [others] if others else []
                for whole in extended([*order, first], [*left[:i], *rest, *left[i + 1 :]]):
                    complete = True
                    yield whole
        if not complete:
            dead.add(state)

    return extended([], list(kinds.values()))


def _unbroken(order: list[_Layer]) -> bool:
    """Whether the layers of each module stand together."""
    parents = [layer.parent for layer in order]
    entered = [parent for i, parent in enumerate(parents) if parent and parent != (parents[i - 1] if i else None)]
    return len(entered) == len(set(entered))


def _home(norm: _Layer, order: list[_Layer]) -> str | None:
    """The layer whose outputs a norm takes in, None for the model's inputs. PlanError where it cannot be told.

    The only one of its size; else the last one before it by number among those named alike, or the one of its number.
    """
    fits = [layer.name for layer in order if layer.shape[0] == norm.shape[0]]
    if order[0].shape[1] != norm.shape[0] and len(fits) == 1:
        return fits[0]
    if not fits and order[0].shape[1] == norm.shape[0]:
        return None
    before = [layer.name for layer in order if layer.kind == norm.kind and layer.numbers < norm.numbers]
    same = [layer.name for layer in order if norm.numbers and layer.numbers == norm.numbers]
    if before[-1:] and before[-1] in fits:
        return before[-1]
    if not before and len(same) == 1 and same[0] in fits:
        return same[0]
    raise PlanError(f"neither sizes nor numbers tell which layer comes before the norm {norm.name} {list(norm.shape)}")
