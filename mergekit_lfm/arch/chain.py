"""Chains of layers, derived from the tensors alone: perceptrons, and plain convolutional networks with BatchNorm.

Each layer reads only the outputs of the one before it. Sizes determine the order, and among equal sizes the numbers in
the names. A file does not name the activations between layers, so units may only change places.
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
_MOST = 1000  # orders to look at; with so many the order is ambiguous


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer with its name, and its tensors by the last part of their names."""

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
        """The name without its numbers, common to layers that differ only by number."""
        return re.sub(r"\d+", "#", self.name)

    @property
    def numbers(self) -> list[int]:
        return [int(digits) for digits in re.findall(r"\d+", self.name)]

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]


def chain_table(specs: Mapping[str, TensorSpec]) -> Symmetries:
    """The table of a chain of layers: every hidden layer's units are a group with the layer's name.

    A chain has linear layers [out, in], convolutions [out, in, ...] and BatchNorms, with or without biases. After a
    convolution a linear layer may read several entries of each channel, as after flattening. Raises PlanError if the
    tensors form no chain, or more than one.
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
        normed = not layer.norm and layer.name in (homes[norm.name] for norm in norms)  # a norm undoes its scale
        ordered = Part(written.group, "order") if written.group else written
        for last, spec in layer.tensors.items():
            first = ordered if last in _STATISTICS or normed else written
            others = [reads[layer.name], *[_KERNEL] * (len(spec.shape) - 2)] if len(spec.shape) > 1 else []
            tensors[spec.name] = tuple((part,) for part in ([first, *others] if spec.shape else []))
    return Symmetries(groups, {name: tensors[name] for name in specs})


def _layers(specs: Mapping[str, TensorSpec]) -> list[_Layer]:
    """The layers in the order of their first tensors. Raises PlanError with all tensors that fit no layer."""
    layers: dict[str, _Layer] = {}
    for name, spec in specs.items():
        layer_name, _, last = name.rpartition(".")
        layers.setdefault(layer_name, _Layer(layer_name)).tensors[last] = spec
    problems = [problem for layer in layers.values() for problem in _problems(layer)]
    if problems or all(layer.norm for layer in layers.values()):
        listed = _few(problems, "; ") or "none of them is a weight"
        raise PlanError(f"the tensors form no chain of linear layers, convolutions and BatchNorms: {listed}")
    return list(layers.values())


def _problems(layer: _Layer) -> list[str]:
    """The tensors that do not belong in a linear layer, a convolution or a BatchNorm."""
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
    """The first eight words, and how many more there are."""
    return between.join(words[:8]) + (f"{between}and {len(words) - 8} more" if len(words) > 8 else "")


def _follows(before: _Layer, after: _Layer) -> bool:
    """True if `after` can read the units of `before`: as many, or several entries per unit after flattening."""
    units, inputs = before.shape[0], after.shape[1]
    flattened = len(before.shape) > 2 and len(after.shape) == 2
    return inputs % units == 0 if flattened else inputs == units


def _order(layers: list[_Layer]) -> list[_Layer]:
    """The layers from input to output. Raises PlanError if no order is possible, or if several are equally good."""
    orders = list(islice(_orders(layers), _MOST))
    whole = [order for order in orders if _keeps_modules_together(order)] if len(orders) > 1 else orders
    if len(whole) > 1 and layers != sorted(layers, key=lambda layer: layer.name):
        whole = [order for order in whole if order == layers]  # not sorted by name: the file has the model's order
    if len(whole) == 1 and len(orders) < _MOST:
        return whole[0]
    shapes = _few([f"{layer.name} {list(layer.shape)}" for layer in layers], ", ")
    if not orders:
        raise PlanError(f"the layers form no chain in which each reads the outputs of the one before it: {shapes}")
    raise PlanError(f"neither sizes nor numbers determine the order of these layers: {shapes}")


def _orders(layers: list[_Layer]) -> Iterator[list[_Layer]]:
    """All orders in which each layer can read the one before, and layers that differ only by number stay in order."""
    kinds: dict[str, list[_Layer]] = {}
    for layer in sorted(layers, key=lambda layer: layer.numbers):
        kinds.setdefault(layer.kind, []).append(layer)

    dead = set()

    def extend(order: list[_Layer], left: list[Sequence[_Layer]]) -> Iterator[list[_Layer]]:
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
                for whole in extend([*order, first], [*left[:i], *rest, *left[i + 1 :]]):
                    complete = True
                    yield whole
        if not complete:
            dead.add(state)

    return extend([], list(kinds.values()))


def _keeps_modules_together(order: list[_Layer]) -> bool:
    """True if the layers of each module are adjacent."""
    parents = [layer.parent for layer in order]
    entered = [parent for i, parent in enumerate(parents) if parent and parent != (parents[i - 1] if i else None)]
    return len(entered) == len(set(entered))


def _home(norm: _Layer, order: list[_Layer]) -> str | None:
    """The layer whose outputs a norm reads, None for the model's inputs. Raises PlanError if it is ambiguous.

    The layer is the only one of the norm's size; else the last before it by number among those of the same kind of
    name, or the one with the same number.
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
    raise PlanError(
        f"neither sizes nor numbers determine which layer comes before the norm {norm.name} {list(norm.shape)}"
    )
