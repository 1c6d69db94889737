"""One pass of a batch of images through a teacher, with all that terms read from it: scores, features, moments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mergekit_lfm.distill.amalgam import teachers_of
from mergekit_lfm.errors import PlanError
from mergekit_lfm.runtime.batchnorm import batchnorms
from mergekit_lfm.runtime.hooks import hook_modules
from mergekit_lfm.runtime.load import logits, run

FEATURES = ("activation", "clusters", "contrast")  # terms that read the inputs of the last linear layer
GRADIENTS = ("gradient", "gradient_l2")


class Moments(NamedTuple):
    """The mean [d] of rows, and their covariance [d, d] or variance [d]."""

    mean: Tensor
    spread: Tensor


@dataclass(frozen=True)
class Pass:
    """A batch of images, and what terms read of it. All of it has gradients in the images.

    scores: the teacher's [n, classes]; features: the inputs of its last linear layer [n, d], of several teachers side
    by side. norms: for each BatchNorm the moments of its inputs, and those it stores; moments: the same of recorded
    layers. targets: classes [n] or probabilities [n, classes]; None for the teacher's own classes. student: its scores.
    latents: the generator's inputs [n, latent], and decoded: a decoder's answer. aims: wanted features. judged: a
    critic's scores [n]. views: features, as a head projects them, of the images, of changed copies, and of others.
    gradients: that of the teacher's loss, and the wanted one, flat. groups: copies of one batch, one after the other.
    """

    images: Tensor
    scores: Tensor
    features: Tensor | None = None
    norms: tuple[tuple[Moments, Moments], ...] = ()
    moments: tuple[tuple[Moments, Moments], ...] = ()
    targets: Tensor | None = None
    student: Tensor | None = None
    latents: Tensor | None = None
    decoded: Tensor | None = None
    aims: Tensor | None = None
    judged: Tensor | None = None
    views: tuple[Tensor, Tensor, Tensor] | None = None
    gradients: tuple[Tensor, Tensor] | None = None
    groups: int = 1

    def get(self, name: str) -> Any:
        """A fact that a term needs. Raises PlanError if the pass was made without it."""
        value = getattr(self, name)
        if value is None or value == ():
            raise PlanError(f"a term reads {name} of a pass that was made without; give that, or leave the term out")
        return value


@dataclass(frozen=True)
class Observer:
    """Passes images through a teacher, and hears what the terms of these names read.

    student: for terms that compare. records: moments by the names of layers. gradient: wanted, by the names of the
    teacher's parameters, for the audit.
    """

    teacher: nn.Module
    terms: frozenset[str]
    student: nn.Module | None = None
    records: Mapping[str, Moments] | None = None
    gradient: Mapping[str, Tensor] | None = None

    def see(self, images: Tensor, **facts: Any) -> Pass:
        """The pass of a batch. facts: what else `Pass` has."""
        norms = [*batchnorms(self.teacher).values()] if "bn" in self.terms else []
        layers = self._recorded() if "records" in self.terms else {}
        last = heads_of(self.teacher) if self.terms.intersection(FEATURES) else []
        heard = dict[nn.Module, Tensor]()
        with hook_modules({each: partial(_keep, heard, each) for each in (*norms, *layers, *last)}, inputs=True):
            scores = logits(run(self.teacher, (images,)))
        seen = Pass(images, scores, **facts)
        if norms:
            pairs = [(moments_of(heard[each], axis=1, whole=False), _stored(each)) for each in norms]
            seen = replace(seen, norms=tuple(pairs))
        if layers:
            pairs = [(moments_of(heard[each], axis=axis_of(each)), wanted) for each, wanted in layers.items()]
            seen = replace(seen, moments=tuple(pairs))
        if last:
            seen = replace(seen, features=torch.cat([heard[each].flatten(1) for each in last], 1))
        if self.student is not None:
            seen = replace(seen, student=logits(run(self.student, (images,))))
        if self.gradient is not None:
            seen = replace(seen, gradients=self._gradients(seen))
        return seen

    def _recorded(self) -> dict[nn.Module, Moments]:
        modules = dict(self.teacher.named_modules())
        if not self.records:
            raise PlanError("the term records needs records of the teacher's layers; give some, or leave it out")
        device = next(self.teacher.parameters()).device
        return {modules[name]: Moments(*(x.to(device) for x in moments)) for name, moments in self.records.items()}

    def _gradients(self, seen: Pass) -> tuple[Tensor, Tensor]:
        """The gradient of the mean cross-entropy of the targets, as far as it is wanted; and the wanted one."""
        wanted = self.gradient or {}
        named = {name: x for name, x in self.teacher.named_parameters() if name in wanted}
        loss = nn.functional.cross_entropy(seen.scores, seen.get("targets"))
        found = torch.autograd.grad(loss, [*named.values()], create_graph=True)
        return torch.cat([x.flatten() for x in found]), torch.cat([wanted[name].flatten() for name in named])


def _keep(heard: dict[nn.Module, Tensor], module: nn.Module, x: Tensor) -> None:
    heard[module] = x


def _stored(norm: Any) -> Moments:
    return Moments(norm.running_mean, norm.running_var)


def axis_of(layer: nn.Module) -> int:
    """The axis of a layer's inputs along which its channels run: 1 of a convolution, else the last one."""
    return 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1


def rows_of(x: Tensor, axis: int) -> Tensor:
    """Inputs of a layer as rows [rows, d]: all axes but the one of d, such as the places of an image, are rows."""
    return x.movedim(axis, -1).flatten(0, -2)


def moments_of(x: Tensor, *, axis: int, whole: bool = True) -> Moments:
    """The moments of inputs of a layer. axis: that of their channels, as `axis_of` says; 1 for a norm.

    whole: the covariance, else the variance. Both are divided by the number of rows.
    """
    rows = rows_of(x, axis)
    mean = rows.mean(0)
    centred = rows - mean
    return Moments(mean, centred.T @ centred / len(rows) if whole else centred.square().mean(0))


def last_linear(model: nn.Module) -> nn.Linear:
    """The last linear layer of a model in the order of its modules: its head. Raises PlanError without one."""
    layers = [each for each in model.modules() if isinstance(each, nn.Linear)]
    if not layers:
        raise PlanError(f"{type(model).__name__} has no linear layer; expected a classifier with a linear head")
    return layers[-1]


def heads_of(model: nn.Module) -> list[nn.Linear]:
    """The heads of all teachers in a model, or its own."""
    return [last_linear(each) for each in teachers_of(model)]


def class_count(model: nn.Module) -> int:
    """How many classes a model scores."""
    return sum(head.out_features for head in heads_of(model))


@contextmanager
def frozen(models: Iterable[nn.Module | None], *, trained: bool = False) -> Iterator[None]:
    """The models in evaluation mode, their parameters without gradients, or with them; as before afterwards."""
    present = [model for model in models if model is not None]
    modes = [(module, module.training) for model in present for module in model.modules()]
    flags = [(x, x.requires_grad) for model in present for x in model.parameters()]
    try:
        for model in present:
            model.eval().requires_grad_(trained)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for x, flag in flags:
            x.requires_grad_(flag)


def scores_in_parts(teacher: nn.Module, images: Tensor, size: int) -> Tensor:
    """The teacher's scores of images, in evaluation mode, in batches of up to `size`, without gradients."""
    with torch.no_grad(), frozen([teacher]):
        return torch.cat([logits(run(teacher, (part,))) for part in torch.split(images, size)])
