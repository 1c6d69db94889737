"""BatchNorm's running statistics, estimated anew on data after the weights have changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mergekit_lfm.errors import PlanError
from mergekit_lfm.runtime.probe import forward

if TYPE_CHECKING:
    from mergekit_lfm.runtime.batches import Batch


def batchnorms(module: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers, of all kinds, that keep running statistics, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }


def reset_batchnorm(module: nn.Module, batches: Sequence[Batch]) -> None:
    """Re-estimate the running mean and variance of every BatchNorm layer, in place, from one pass over the batches.

    They become the means of the batches' own means and unbiased variances; every batch has the same weight. All other
    layers stay out of training mode: dropout stays off. Source: Izmailov et al. 2018 (SWA, arXiv 1803.05407), section
    3.2. Raises PlanError if the module has no such layer.
    """
    layers = list(batchnorms(module).values())
    if not layers:
        raise PlanError(
            f"{type(module).__name__} has no BatchNorm layer with running statistics, expected some to re-estimate; "
            "leave the re-estimation out"
        )
    before = [(layer.momentum, layer.training) for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative average
            layer.training = True
        with torch.no_grad():
            for batch in batches:
                forward(module, batch)
    finally:
        for layer, (momentum, training) in zip(layers, before, strict=True):
            layer.momentum, layer.training = momentum, training
