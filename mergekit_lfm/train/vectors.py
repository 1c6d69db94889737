"""The vectors of a classifier's examples: what the last layer reads of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.errors import PlanError
from mergekit_lfm.train.examples import Batch


def head_of(model: nn.Module, beside: str = "") -> nn.Module:
    """The last layer of a classifier. beside: the name of modules in it that are not its own.

    Raises PlanError if it is not a linear one.
    """
    config: Any = getattr(model, "config", None)
    count = getattr(config, "num_labels", None)
    own = [x for name, x in model.named_modules() if not beside or beside not in name.split(".")]
    linear = [x for x in own if isinstance(x, nn.Linear) and count in (None, x.out_features)]
    if not linear:
        raise PlanError(
            f"{type(model).__name__} has no linear layer for its {count} classes, whose inputs are its vectors; leave "
            "out the terms that compare vectors"
        )
    return linear[-1]


@contextmanager
def hearing_vectors(model: nn.Module, beside: str = "") -> Iterator[list[Tensor]]:
    """The inputs of a classifier's head while it runs."""
    heard = list[Tensor]()
    handle = head_of(model, beside).register_forward_pre_hook(lambda _, arguments: heard.append(arguments[0]))
    try:
        yield heard
    finally:
        handle.remove()


def vectors_of(read: Tensor, batch: Batch) -> Tensor:
    """The vectors [n, width] of a batch in what a head has read of it."""
    if read.ndim == 3:  # a decoder's head reads each token, and the last one counts
        mask = batch["attention_mask"]
        last = read.shape[1] - mask.shape[1] + mask.sum(1) - 1  # behind the virtual tokens of a prompt
        read = read[torch.arange(len(read), device=read.device), last]
    return read.flatten(1)
