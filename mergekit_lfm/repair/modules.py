"""Repair a module in memory, one hidden layer after the other: measure each after the ones before it are repaired."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.arch import Symmetries
from mergekit_lfm.errors import PlanError
from mergekit_lfm.kernels.sums import round_once
from mergekit_lfm.machine.progress import Count
from mergekit_lfm.repair.layers import HiddenLayer, LayerMoments, hidden_layers, measure
from mergekit_lfm.runtime.batches import Batch, as_batches
from mergekit_lfm.runtime.batchnorm import batchnorms, reset_batchnorm
from mergekit_lfm.runtime.subject import Subject, evaluation_mode, make_subject
from mergekit_lfm.store.checkpoint import Checkpoint

# A unit whose spread is below this fraction of its size counts as constant: float32 outputs resolve no less.
CONSTANT = 1e-6


@dataclass(frozen=True)
class RepairedLayer:
    """The change of a layer. spread: the mean over its units of their standard deviation before, divided by the new
    one; shift: the mean distance between their old and new means, divided by the same."""

    name: str
    units: int
    spread: float
    shift: float


@dataclass(frozen=True)
class Repaired:
    """The result of a repair: the layers in the order of their repair, the names of the BatchNorm layers with new
    estimates, and by name why other layers were left alone and files left behind."""

    layers: tuple[RepairedLayer, ...]
    batchnorms: tuple[str, ...]
    left: Mapping[str, str]


def repair_module(
    module: nn.Module,
    ends: Sequence[nn.Module],
    data: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
    symmetries: Symmetries | None = None,
    progress: Count | None = None,
) -> Repaired:
    """Bring the hidden units of a merged module, in place, to the mean and spread that they have in its ends.

    ends: modules of the same class, as they were merged (a rewritten one as it was rewritten); weights: how much of
    each, summing to 1, equal by default. data: any input of `as_batches`. Every unit y that a Linear or convolution
    with a bias writes becomes y' = c y + d, with mean sum w m_i and standard deviation sum w s_i on the data, where m_i
    and s_i are those in the ends; c and d go into weight and bias. A unit that is constant in the merged module is only
    shifted. BatchNorm gets new running statistics instead, and again after the repair of layers before it. The
    symmetry table decides which layers write hidden units; without one all do but the last to be called. The repair
    takes one pass over the data for each layer of the module, two with BatchNorm, and one for each end.

    Source: Jordan et al. 2023 (REPAIR, arXiv 2211.08403), its conditions on mean and standard deviation; these are
    mixed, not the variances.
    Raises PlanError if there is nothing to repair, with the reasons, and if the weights do not fit.
    """
    batches = as_batches(data)
    shares = check_weights(weights, len(ends))
    subject = make_subject(module)
    with evaluation_mode(module, *ends):
        layers, left = plan_repair(subject, symmetries, batches)
        tell = make_counter(progress, len(layers), len(ends), batches)
        measured = [measure(end, layers, batches, tell) if layers else {} for end in ends]
        return repair_layers(subject, layers, left, combine(measured, shares), batches, tell=tell)


def check_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """The weights of the ends. Raises PlanError unless there is one for each, all at least 0, with sum 1."""
    if not count:
        raise PlanError("found no ends, expected the models that were merged; give them")
    shares = tuple(1 / count for _ in range(count)) if weights is None else tuple(weights)
    fits = len(shares) == count and all(math.isfinite(w) and w >= 0 for w in shares)
    if not fits or abs(sum(shares) - 1) > 1e-6:
        raise PlanError(
            f"weights are {', '.join(map(str, shares))}; expected {count} numbers of at least 0 with sum 1, one for "
            "each end. Give the weights of the merge"
        )
    return shares


def plan_repair(
    subject: Subject, symmetries: Symmetries | None, batches: Sequence[Batch]
) -> tuple[list[HiddenLayer], dict[str, str]]:
    """The layers to repair, and why others are left alone. Raises PlanError without any such layer and BatchNorm."""
    layers, left = hidden_layers(subject, symmetries, next(iter(batches)))
    if not layers and not batchnorms(subject.module):
        reasons = [f"{name}: {reason}" for name, reason in left.items()] or ["it has neither Linear nor convolution"]
        shown = reasons[:20] + ([f"and {len(reasons) - 20} more"] if len(reasons) > 20 else [])
        raise PlanError(
            f"there is nothing to repair in {type(subject.module).__name__}:\n  "
            + "\n  ".join(shown)
            + "\nExpected hidden units that a Linear or convolution with a bias writes, or BatchNorm layers; a model "
            "without them, such as a Llama, cannot be repaired"
        )
    return layers, left


def make_counter(progress: Count | None, layers: int, ends: int, batches: Sequence[Batch]) -> Callable[[Batch], None]:
    """A function to call with every measured batch: it reports the number of examples so far and in all."""
    total = (ends + layers) * sum(map(len, batches))
    done = 0

    def tell(batch: Batch) -> None:
        nonlocal done
        done += len(batch)
        if progress is not None:
            progress(done, total)

    return tell


def combine(ends: Sequence[Mapping[str, LayerMoments]], weights: Sequence[float]) -> dict[str, LayerMoments]:
    """The target moments of each layer's units: sum w m_i and sum w s_i."""

    def mix(name: str, which: int) -> Tensor:
        return torch.stack([w * end[name][which] for w, end in zip(weights, ends, strict=True)]).sum(0)

    return {name: (mix(name, 0), mix(name, 1)) for name in ends[0]}


def repair_layers(
    subject: Subject,
    layers: Sequence[HiddenLayer],
    left: Mapping[str, str],
    targets: Mapping[str, LayerMoments],
    batches: Sequence[Batch],
    *,
    tell: Callable[[Batch], None],
    stored: Checkpoint | None = None,
) -> Repaired:
    """Repair the layers one by one. stored: round the repaired parameters to the dtypes of this checkpoint."""
    norms = batchnorms(subject.module)
    done = []
    for layer in layers:
        if norms:
            reset_batchnorm(subject.module, batches)
        now = measure(subject.module, [layer], batches, tell)[layer.name]
        done.append(_repair(layer, now, targets[layer.name], stored))
    if norms:
        reset_batchnorm(subject.module, batches)
    return Repaired(tuple(done), tuple(norms), dict(left))


def _repair(layer: HiddenLayer, now: LayerMoments, target: LayerMoments, stored: Checkpoint | None) -> RepairedLayer:
    """Set W' = c W and b' = c b + d, so that y' = c y + d has the target's mean and standard deviation."""
    (mean, std), (wanted_mean, wanted_std) = now, target
    varied = std > CONSTANT * (mean.square() + std.square()).sqrt()
    c = torch.where(varied, wanted_std / std.where(varied, torch.ones_like(std)), 1.0)  # [units]
    d = wanted_mean - c * mean
    weight, bias = layer.module.weight, layer.module.bias
    assert isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter)
    shape = [1] * weight.ndim
    shape[layer.axis] = -1
    for parameter, names, value in (
        (weight, layer.weights, weight.double().cpu() * c.view(shape)),
        (bias, layer.biases, c * bias.double().cpu() + d),
    ):
        dtype = parameter.dtype if stored is None else getattr(torch, stored[names[0]].dtype)
        with torch.no_grad():
            parameter.copy_(round_once(value.detach(), dtype))
    kept = varied & (wanted_std > 0)
    spread, shift = (std / wanted_std)[kept], ((mean - wanted_mean).abs() / wanted_std)[kept]
    return RepairedLayer(layer.name, layer.units, *(float(x.mean()) if len(x) else 1.0 for x in (spread, shift)))
