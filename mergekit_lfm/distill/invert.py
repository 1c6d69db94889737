"""`invert`: make images for a model by gradients in their pixels, so that terms of a loss become small."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from mergekit_lfm.distill.image_terms import COMPARING, check_finite, check_terms, weigh
from mergekit_lfm.distill.impressions import draw_classes, draw_impressions
from mergekit_lfm.distill.making import Making
from mergekit_lfm.distill.metadata import Clusters
from mergekit_lfm.distill.passes import GRADIENTS, Moments, Observer, class_count, frozen, heads_of, scores_in_parts
from mergekit_lfm.distill.samples import Samples
from mergekit_lfm.errors import PlanError
from mergekit_lfm.train.examples import seed_of
from mergekit_lfm.train.loop import Tell

TARGETS = ("classes", "impressions")


@dataclass(frozen=True, slots=True)
class Inversion:
    """How images are made from noise. steps: of Adam, for each batch; its rate falls by half a cosine.

    low, high: the range of pixels, to which they are cut after each step. targets: "classes" in equal numbers, or
    "impressions", soft ones. jitter: the most pixels by which a batch is moved, in a circle, for a step. noise: eps of
    Langevin's noise sqrt(2 eps) n at the first step, n normal; eps falls to a ten-thousandth. Source of the noise:
    Braun et al. 2024, arXiv 2306.02090.
    """

    steps: int = 200
    learning_rate: float = 0.1
    batch_size: int = 256
    low: float = 0.0
    high: float = 1.0
    targets: Literal["classes", "impressions"] = "classes"
    jitter: int = 0
    noise: float = 0.0

    def __post_init__(self) -> None:
        """Raise PlanError for settings out of range, with all of them."""
        problems = [
            f"{name} is {value!r}; expected {expected}"
            for name, value, expected, right in (
                ("steps", self.steps, "at least 1", self.steps >= 1),
                ("learning_rate", self.learning_rate, "a number above 0", 0 < self.learning_rate < math.inf),
                ("batch_size", self.batch_size, "at least 2", self.batch_size >= 2),
                ("high", self.high, f"a number above low, {self.low}", self.low < self.high < math.inf),
                ("targets", self.targets, " or ".join(TARGETS), self.targets in TARGETS),
                ("jitter", self.jitter, "at least 0", self.jitter >= 0),
                ("noise", self.noise, "at least 0", 0 <= self.noise < math.inf),
            )
            if not right
        ]
        if problems:
            raise PlanError("; ".join(problems))

    def random(self, shape: tuple[int, ...], seed: int) -> Tensor:
        """Uniform noise over the range of pixels."""
        noise = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        return self.low + (self.high - self.low) * noise


@dataclass(frozen=True)
class Facts:
    """Facts that some terms read. student: for terms that compare; records, clusters: of the teacher on its data.

    gradient: wanted, by the names of the teacher's parameters; targets: the class of each image, or its
    probabilities, or None to draw them. groups: copies of each image that are made together, in one batch, for the term
    `group`.
    """

    student: nn.Module | None = None
    records: Mapping[str, Moments] | None = None
    clusters: Clusters | None = None
    gradient: Mapping[str, Tensor] | None = None
    targets: Tensor | None = None
    groups: int = 1


NOTHING = Facts()


def invert(
    teacher: nn.Module,
    terms: Mapping[str, float],
    shape: tuple[int, int, int],
    count: int,
    *,
    options: Inversion | None = None,
    facts: Facts = NOTHING,
    seed: int = 0,
    tell: Tell | None = None,
    making: Making | None = None,
) -> Samples:
    """Images [count, *shape] that make the weighted sum of terms small, and the teacher's scores of them.

    Batches are made one after the other; one seed gives the same images. making: what the steps are part of, else they
    are all. The teacher runs in evaluation mode and stays as it is. Raises PlanError for unknown terms, for terms
    without their facts, for facts of another number of images, and for a loss that is not finite.
    """
    options = options or Inversion()
    check_terms(terms)
    _check_count(facts, count, options)
    observer = Observer(
        teacher,
        frozenset(terms),
        facts.student if set(COMPARING) & terms.keys() else None,
        facts.records,
        facts.gradient if set(GRADIENTS) & terms.keys() else None,
    )
    made, size, making = list[Tensor](), min(options.batch_size, count), making or Making()
    with frozen([teacher], trained=observer.gradient is not None), frozen([facts.student]):
        for start in range(0, count, size):
            own = seed_of(seed, "batch", start)
            targets = None if facts.targets is None else facts.targets[start : start + size]
            form, batch = (min(size, count - start), *shape), replace(facts, targets=targets)
            made.append(_invert_batch(observer, terms, form, options, batch, own, tell, making))
    images = torch.cat(made)
    return Samples(images, scores_in_parts(teacher, images, size))


def _check_count(facts: Facts, count: int, options: Inversion) -> None:
    """Raise PlanError for targets or groups that do not go with the number of images."""
    if facts.targets is not None and len(facts.targets) != count:
        raise PlanError(f"found {len(facts.targets)} targets for {count} images; expected one for each. Give as many")
    if facts.groups > 1 and (count > options.batch_size or count % facts.groups):
        raise PlanError(
            f"found {facts.groups} groups of {count} images, {options.batch_size} in a batch; expected groups of one "
            "size, and all in one batch. Correct the number of images, or give a larger batch_size"
        )


def _invert_batch(
    observer: Observer,
    terms: Mapping[str, float],
    shape: tuple[int, ...],
    options: Inversion,
    facts: Facts,
    seed: int,
    tell: Tell | None,
    making: Making,
) -> Tensor:
    """The images of one batch."""
    device = next(observer.teacher.parameters()).device
    known = {name: x.to(device) for name, x in _targets(observer, terms, shape[0], options, facts, seed).items()}
    images = options.random(shape, seed_of(seed, "start")).to(device).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=options.learning_rate, betas=(0.5, 0.9))
    making.share(optimizer)
    making.hold_images(f"images/{seed}", images)
    for step in range(options.steps):
        if making.is_done():
            continue
        generator = torch.Generator().manual_seed(seed_of(seed, "step", step))
        share = (1 + math.cos(math.pi * step / options.steps)) / 2
        optimizer.param_groups[0]["lr"] = options.learning_rate * share
        total, values = weigh(
            terms, observer.see(_move(images, options.jitter, generator), groups=facts.groups, **known)
        )
        check_finite(total, f"the loss in step {step + 1}", options.learning_rate)
        (images.grad,) = torch.autograd.grad(total, [images])
        optimizer.step()
        with torch.no_grad():
            if options.noise:
                eps = options.noise * 10 ** (-4 * step / options.steps)
                images += (2 * eps) ** 0.5 * torch.randn(shape, generator=generator).to(device)
            images.clamp_(options.low, options.high)
        line = {name: float(value.detach()) for name, value in values.items()}
        if step == options.steps - 1:
            making.forget(images)
        making.add(line)
        if tell is not None:
            tell(step + 1, options.steps, line)
    return images.detach()


def _targets(
    observer: Observer, terms: Mapping[str, float], count: int, options: Inversion, facts: Facts, seed: int
) -> dict[str, Tensor]:
    """The targets of a batch, and the features that it is to have."""
    known = dict[str, Tensor]()
    if "clusters" in terms:
        if facts.clusters is None:
            raise PlanError("the term clusters needs clusters of the teacher's features; give them, or leave it out")
        known["aims"] = facts.clusters.draw(count, torch.Generator().manual_seed(seed_of(seed, "aims")))
    if facts.targets is not None:
        return known | {"targets": facts.targets}
    if options.targets == "impressions":
        weights = [head.weight for head in heads_of(observer.teacher)]
        weight = torch.block_diag(*weights)  # type: ignore[no-untyped-call]  # no class is like another teacher's
        return known | {"targets": draw_impressions(weight, count, seed)}
    if {"one_hot", "boundary"} & terms.keys():
        known["targets"] = draw_classes(count, class_count(observer.teacher), seed)
    return known


def _move(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """The images moved in a circle by up to `most` pixels both ways, all alike."""
    if not most:
        return images
    shifts = torch.randint(-most, most + 1, (2,), generator=generator).tolist()
    return images.roll(shifts, (-2, -1))
