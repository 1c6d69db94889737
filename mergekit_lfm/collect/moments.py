"""Second moments of the inputs of linear layers: Gram matrices of one model, cross moments of two on the same data.

Products cover a fixed number of tokens at a time, in float32 at least, and are added up in float64: their error does
not grow with the data. The inputs get a 1 appended, so that the last row and column hold the mean, and the corner of
the sum is the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergekit_lfm.artifacts.statistics import Layer
from mergekit_lfm.collect.linear import NOT_CALLED, check_sharing, find_inputs_read, linear_layers, listen_to_inputs
from mergekit_lfm.collect.request import Outline, StatisticsRequest
from mergekit_lfm.errors import PlanError

if TYPE_CHECKING:
    from mergekit_lfm.runtime.batches import Batch
    from mergekit_lfm.runtime.subject import Subject

TOKENS = 1024  # tokens multiplied at a time
COLUMNS = 256  # columns of a product at a time: a symmetric one is computed above the diagonal only, to this width


def _tokens(x: Tensor) -> list[Tensor]:
    """x [..., in] as matrices [at most TOKENS, in + 1], in float32 at least, with a 1 appended to every row."""
    flat = x.reshape(-1, x.shape[-1])
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [torch.nn.functional.pad(rows.to(dtype), (0, 1), value=1.0) for rows in torch.split(flat, TOKENS)]


def _add_product(total: Tensor, first: Tensor, second: Tensor, *, symmetric: bool) -> None:
    """total += first^T second; if symmetric, only the part on and above the diagonal (and a little below)."""
    for begin in range(0, second.shape[1], COLUMNS):
        end = begin + COLUMNS
        rows = end if symmetric else None
        total[:rows, begin:end] += (first[:, :rows].T @ second[:, begin:end]).to(total.device)


def _mirror(total: Tensor) -> None:
    """Copy the triangle above the diagonal to below it, in place."""
    for begin in range(0, len(total), COLUMNS):
        rows = slice(begin, begin + COLUMNS)
        total[rows, :begin] = total[:begin, rows].T
        above = total[rows, rows].triu(1)
        total[rows, rows].tril_().triu_().add_(above).add_(above.T)


class _Moments:
    """The common part of Gram and cross moments: the layers by name, and the groups that read the same inputs."""

    units: dict[str, dict[str, tuple[int, ...]]]

    def __init__(self, request: StatisticsRequest) -> None:
        self.subjects = request.subjects
        layers_and_skipped = [linear_layers(subject, request.layers) for subject in self.subjects]
        self.linear = [layers for layers, _ in layers_and_skipped]
        self.skipped = {name: reason for _, skipped in reversed(layers_and_skipped) for name, reason in skipped.items()}
        read = []
        for subject, layers in zip(self.subjects, self.linear, strict=True):
            read.append(find_inputs_read(subject, layers, request.data))
        self._drop_uncalled(read)
        _check_names([list(layers) for layers in self.linear])
        self.groups = _groups(read, self.linear[0])

    def _drop_uncalled(self, read: list[dict[str, list[object]]]) -> None:
        for layers, inputs in zip(self.linear, read, strict=True):
            for name in [name for name in layers if not inputs[name]]:
                del layers[name]
                self.skipped[name] = NOT_CALLED
        if not all(self.linear):
            raise PlanError("no linear layer was called while the model ran on the data; give a model that calls some")

    def _wanted(self, prefix: str, sums: Mapping[str, Tensor]) -> dict[str, list[str]]:
        """The groups whose sums are requested."""
        return {first: names for first, names in self.groups.items() if f"{prefix}/{first}" in sums}

    def layers(self, counts: Mapping[str, int]) -> dict[str, Layer]:
        """The layers with their entries; for two models, those of the first."""
        entries = {name: first for first, names in self.groups.items() for name in names}
        return {name: layer.described(entries[name], counts[entries[name]]) for name, layer in self.linear[0].items()}

    def norm(self, squares: float) -> None:  # noqa: ARG002
        """None: moments of different layers have no common norm."""
        return None


def _check_names(names: list[list[str]]) -> None:
    wrong = [f"{name}: only in the first model" for name in names[0] if name not in names[-1]]
    wrong += [f"{name}: only in the second model" for name in names[-1] if name not in names[0]]
    if wrong:
        raise PlanError(
            "the models differ in the linear layers that they call; expected the same names in both:\n  "
            + "\n  ".join(wrong)
            + "\nChoose those that both have (`layers`)"
        )


def _groups(read: list[dict[str, list[object]]], names: Iterable[str]) -> dict[str, list[str]]:
    """The layers that read the same inputs in every model, grouped under the first of them."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(repr([inputs[name] for inputs in read]), []).append(name)
    return {group[0]: group for group in groups.values()}


class GramStatistic(_Moments):
    """G = mean over tokens of [x; 1][x; 1]^T, [in + 1, in + 1], for the inputs x of every linear layer."""

    def __init__(self, request: StatisticsRequest) -> None:
        super().__init__(request)
        sizes = {name: layer.inputs + 1 for name, layer in self.linear[0].items()}
        self.units = {first: {f"gram/{first}": (sizes[first], sizes[first])} for first in self.groups}

    def add(self, batch: Batch, sums: Mapping[str, Tensor]) -> None:
        """Run the model on the batch and add the products of its layers' inputs."""
        groups = self._wanted("gram", sums)

        def hear(name: str, x: Tensor) -> None:
            if name in groups:
                for rows in _tokens(x):
                    _add_product(sums[f"gram/{name}"], rows, rows, symmetric=True)

        members = {name: self.linear[0][name] for names in groups.values() for name in names}
        with listen_to_inputs(members, hear) as read, torch.no_grad():
            self.subjects[0].run(batch)
        check_sharing(groups, read)

    def finish(self, unit: str, sums: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """The mean, both triangles filled."""
        total = sums[f"gram/{unit}"]
        _mirror(total)
        count = round(float(total[-1, -1]))
        return {f"gram/{unit}": total.div_(count)}, count


def outline_gram(subject: Subject, patterns: Sequence[str]) -> Outline:
    """The file of Gram matrices of a model without values: as if each layer were called, and had inputs of its own."""
    layers, skipped = linear_layers(subject, patterns)
    entries = {f"gram/{name}": (layer.inputs + 1, layer.inputs + 1) for name, layer in layers.items()}
    return Outline(entries, {name: layer.described(name, 1) for name, layer in layers.items()}, skipped)


class CrossStatistic(_Moments):
    """C = mean over tokens of [x; 1][y; 1]^T for inputs x, y of the same layer in two models, and their mean squares.

    `cross/LAYER` is [in of the first + 1, in of the second + 1]; `power/first/LAYER` and `power/second/LAYER` are the
    means of [x; 1]^2 and [y; 1]^2, from which correlations follow.
    """

    def __init__(self, request: StatisticsRequest) -> None:
        super().__init__(request)
        self.units = {}
        for first in self.groups:
            one, two = (layers[first].inputs + 1 for layers in self.linear)
            shapes = {"cross": (one, two), "power/first": (one,), "power/second": (two,)}
            self.units[first] = {f"{prefix}/{first}": shape for prefix, shape in shapes.items()}

    def add(self, batch: Batch, sums: Mapping[str, Tensor]) -> None:
        """Run both models on the batch and add the products of inputs of the same token."""
        groups = self._wanted("cross", sums)
        queues: dict[str, list[Tensor]] = {first: [] for first in groups}

        def keep(name: str, x: Tensor) -> None:
            if name in groups:
                queues[name].append(x.reshape(-1, x.shape[-1]).clone())  # the model may change it in place

        def hear(name: str, y: Tensor) -> None:
            if name in groups:
                _check_tokens(name, queues[name], y)
                self._add_pair(name, queues[name].pop(0), y, sums)

        members = [name for names in groups.values() for name in names]
        for subject, layers, use in zip(self.subjects, self.linear, (keep, hear), strict=True):
            with listen_to_inputs({name: layers[name] for name in members}, use) as read, torch.no_grad():
                subject.run(batch)
            check_sharing(groups, read)
        for name, rest in queues.items():
            if rest:
                _check_tokens(name, rest, rest[0][:0])

    def _add_pair(self, name: str, x: Tensor, y: Tensor, sums: Mapping[str, Tensor]) -> None:
        for first, second in zip(_tokens(x), _tokens(y), strict=True):
            both = torch.promote_types(first.dtype, second.dtype)
            _add_product(sums[f"cross/{name}"], first.to(both), second.to(first.device, both), symmetric=False)
            for side, rows in (("first", first), ("second", second)):
                power = sums[f"power/{side}/{name}"]
                power += rows.square().sum(0).to(power.device)

    def finish(self, unit: str, sums: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """The means."""
        count = round(float(sums[f"cross/{unit}"][-1, -1]))
        return {name: sums[name].div_(count) for name in self.units[unit]}, count


def _check_tokens(name: str, queue: list[Tensor], y: Tensor) -> None:
    second, first = y.numel() // max(1, y.shape[-1]), len(queue[0]) if queue else 0
    if second != first:
        raise PlanError(
            f"{name}: the first model read {first} tokens where the second read {second}; expected as many, since "
            "tokens are compared one by one. Give models that cut the data into the same tokens"
        )
