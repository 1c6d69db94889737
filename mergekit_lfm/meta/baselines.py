"""Starts to compare an initialisation with: a random one, and joint training on the examples of all tasks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.meta.losses import BESIDE
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.train.examples import Examples
from mergekit_lfm.train.loop import Tell, fit
from mergekit_lfm.train.losses import LOSSES
from mergekit_lfm.train.vectors import head_of

Start = Mapping[str, Tensor]


def head_names(model: nn.Module) -> frozenset[str]:
    """The names of the parameters of a classifier's head. Raises PlanError for one that is not linear."""
    head = {id(x) for x in head_of(model).parameters()}
    return frozenset(name for name, x in model.named_parameters() if id(x) in head)


def plain_copy(model: nn.Module, start: Start) -> nn.Module:
    """A copy of a model at a start, whose parameters alone are trained, without what was learned beside it."""
    copied = copy.deepcopy(model)
    if hasattr(copied, BESIDE):
        delattr(copied, BESIDE)
    with torch.no_grad():
        for name, x in copied.named_parameters():
            x.requires_grad_(name in start)
            if name in start:
                x.copy_(start[name])
    return copied


def random_start(model: nn.Module, start: Start, seed: int) -> dict[str, Tensor]:
    """The parameters of a new model of the same class and config."""
    kind: Any = type(model)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        fresh: nn.Module = kind(model.config)
    new = dict(fresh.named_parameters())
    return {name: new[name].detach().to(x.device, x.dtype) for name, x in start.items()}


def joint_start(
    model: nn.Module,
    start: Start,
    examples: Examples,
    task: str,
    options: Options,
    *,
    by_classes: bool,
    place: Path | None = None,
    request: str = "",
    tell: Tell | None = None,
) -> dict[str, Tensor]:
    """The parameters after ordinary training from a start on the examples of all tasks.

    by_classes: for tasks that are some of the classes: a new head of all classes is trained with the model, and left.
    """
    copied, kept = plain_copy(model, start), frozenset[str]()
    if by_classes:
        kept = head_names(copied)
        labels = sorted({int(item["labels"]) for item in examples.items})
        numbered = [{**x, "labels": torch.tensor(labels.index(int(x["labels"])))} for x in examples.items]
        examples = replace(examples, items=numbered)
        _replace_head(copied, len(labels), options.seed)
    fit(copied, examples, LOSSES[task], options, place=place, request=request, tell=tell)
    named = dict(copied.named_parameters())
    return {name: x if name in kept else named[name].detach() for name, x in start.items()}


def _replace_head(model: nn.Module, classes: int, seed: int) -> None:
    """Give a classifier a new head of so many classes."""
    head = head_of(model)
    assert isinstance(head, nn.Linear)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        new = nn.Linear(head.in_features, classes, bias=head.bias is not None).to(head.weight.device, head.weight.dtype)
    name = next(name for name, module in model.named_modules() if module is head)
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, new)
