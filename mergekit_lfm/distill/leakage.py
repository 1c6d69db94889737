"""`audit`: how much of its data a change of a model's weights gives away, by making images of the same gradient.

For the owner of a model who is about to share a fine-tune's difference, or the gradients of federated rounds, and wants
to see on data of his own which pictures could be read from them. Small batches, few steps and smooth activations
give away most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from mergekit_lfm.distill.image_terms import TERMS
from mergekit_lfm.distill.invert import Facts, Inversion, invert
from mergekit_lfm.distill.passes import Observer, frozen, last_linear
from mergekit_lfm.distill.samples import Samples
from mergekit_lfm.errors import PlanError, did_you_mean, several
from mergekit_lfm.runtime.batchnorm import batchnorms
from mergekit_lfm.train.loop import Tell

Way = Literal["deep_leakage", "inverting_gradients", "gradinversion"]
WAYS: Mapping[Way, Mapping[str, float]] = {
    "deep_leakage": {"gradient_l2": 1.0},  # Zhu et al. 2019, arXiv 1906.08935
    "inverting_gradients": {"gradient": 1.0, "total_variation": 1e-5},  # Geiping et al. 2020, arXiv 2003.14053
    # Yin et al. 2021, arXiv 2104.07586, with a cosine in place of its distance; bn for models with BatchNorm alone.
    "gradinversion": {"gradient": 1.0, "bn": 1e-4, "total_variation": 1e-5, "l2": 1e-7, "group": 1e-3},
}


@dataclass(frozen=True)
class Leak:
    """Images that give a gradient like the one that was shared, and their classes.

    match: the cosine of both gradients, 1 if the images explain all of it. Whether an image is a true one is seen by
    its `correlation` with that.
    """

    samples: Samples
    labels: Tensor
    match: float


def audit(
    model: nn.Module,
    gradient: Mapping[str, Tensor],
    shape: tuple[int, int, int],
    *,
    count: int = 1,
    way: Way = "inverting_gradients",
    labels: Tensor | None = None,
    groups: int = 1,
    options: Inversion | None = None,
    seed: int = 0,
    tell: Tell | None = None,
) -> Leak:
    """The images [count, *shape] whose mean gradient at the model is most like `gradient`, by names of parameters.

    gradient: as it was shared, or from two models by `as_gradient`. labels: the classes [count], by default as
    `read_labels` finds them. groups: of "gradinversion", attempts that are drawn to their mean, the answer. The model
    runs in evaluation mode and stays as it is. Raises PlanError for names or shapes that are not the model's.
    """
    _check(model, gradient, way)
    labels = read_labels(model, gradient, count) if labels is None else labels
    if labels.shape != (count,):
        raise PlanError(f"found labels of shape {list(labels.shape)} for {count} images; expected one for each")
    terms = {name: weight for name, weight in WAYS[way].items() if name != "bn" or batchnorms(model)}
    copies = groups if "group" in terms else 1
    facts = Facts(gradient=gradient, targets=labels.repeat(copies), groups=copies)
    options = replace(options or Inversion(steps=300), batch_size=max(2, count * copies))
    made = invert(model, terms, shape, count * copies, options=options, facts=facts, seed=seed, tell=tell)
    images = made.images.reshape(copies, count, *shape).mean(0)
    with frozen([model], trained=True):
        seen = Observer(model, frozenset(), gradient=gradient).see(images, targets=labels.to(images.device))
    samples = Samples(images, seen.scores.detach())
    return Leak(samples, labels, 1 - float(TERMS["gradient"](seen).detach()))


def as_gradient(base: nn.Module, tuned: nn.Module, learning_rate: float = 1.0) -> dict[str, Tensor]:
    """(base - tuned) / learning_rate: the gradient, if one step of plain descent led from the base to the tuned model.

    For several steps it is their sum, at changing weights, which gives away less. Only the direction counts for ways
    that compare by cosines. Parameters that did not change are left out: they were not trained.
    """
    after = dict(tuned.named_parameters())
    return {
        name: (x - after[name]).detach() / learning_rate
        for name, x in base.named_parameters()
        if not torch.equal(x, after[name])
    }


def read_labels(model: nn.Module, gradient: Mapping[str, Tensor], count: int) -> Tensor:
    """The classes of the examples behind a gradient: where that of the head's bias is least, which is mean(p - y).

    Certain for one example, a guess for several, each of another class. Source: Zhao et al. 2020, arXiv 2001.02610.
    Raises PlanError if the gradient lacks the head's bias, or there are more examples than classes.
    """
    head = last_linear(model)
    name = next(name for name, each in model.named_modules() if each is head)
    slopes = gradient.get(f"{name}.bias")
    if slopes is None or count > len(slopes):
        raise PlanError(
            f"the classes of {count} examples cannot be read: expected a gradient of {name}.bias, and at most as many "
            "examples as classes. Give the labels"
        )
    return slopes.argsort()[:count]


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation of the pixels of two images: 1 for the same up to brightness and contrast."""
    return float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])


def _check(model: nn.Module, gradient: Mapping[str, Tensor], way: str) -> None:
    if way not in WAYS:
        raise PlanError(f"found the way {way!r}; expected {', '.join(WAYS)}; {did_you_mean(way, WAYS)}")
    shapes = {name: x.shape for name, x in model.named_parameters()}
    wrong = [
        f"{name}: found {list(x.shape)}, the model has {list(shapes[name]) if name in shapes else 'no such parameter'}"
        for name, x in gradient.items()
        if shapes.get(name) != x.shape
    ]
    wrong += [] if gradient else ["it is empty; did the models differ?"]
    if wrong:
        raise PlanError(several("the gradient is not one of this model", wrong))
