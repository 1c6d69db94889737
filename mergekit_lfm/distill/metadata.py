"""Facts about a teacher's data that are kept in their place: moments of layers' inputs, and clusters of features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mergekit_lfm.artifacts.statistics import Statistics
from mergekit_lfm.distill.passes import Moments, axis_of, frozen, last_linear, rows_of
from mergekit_lfm.errors import PlanError, shorten
from mergekit_lfm.runtime.hooks import hook_modules
from mergekit_lfm.runtime.load import logits, run
from mergekit_lfm.train.examples import seed_of

ROUNDS = 20  # of k-means
PART = 128  # images that the teacher sees at once


def collect_records(teacher: nn.Module, images: Tensor) -> dict[str, Moments]:
    """The mean and covariance of the inputs of each linear and convolutional layer but the first called, by name.

    The first one reads the images themselves. Places of an image are rows. images: [n, channels, h, w]; sums over parts
    of them are in float64, so that it does not matter how many there are.
    """
    layers = {each: name for name, each in teacher.named_modules() if isinstance(each, nn.Linear | nn.Conv2d)}
    axes, sums = {name: axis_of(each) for each, name in layers.items()}, dict[str, Tensor]()

    def add(name: str, x: Tensor) -> None:
        rows = rows_of(x, axes[name]).double()
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)  # [rows, d + 1]
        sums[name] = sums.get(name, 0) + rows.T @ rows

    with (
        frozen([teacher]),
        torch.no_grad(),
        hook_modules({each: partial(add, name) for each, name in layers.items()}, inputs=True),
    ):
        for part in torch.split(images, PART):
            run(teacher, (part,))
    return {name: _moments(gram / gram[-1, -1]) for name, gram in [*sums.items()][1:]}


def _moments(gram: Tensor) -> Moments:
    """The moments in float32, from the mean [d + 1, d + 1] of [x; 1][x; 1]^T."""
    mean = gram[-1, :-1]
    return Moments(mean.float(), (gram[:-1, :-1] - torch.outer(mean, mean)).float())


def read_records(
    statistics: Statistics, teacher: nn.Module, tensors: Mapping[str, str] | None = None
) -> dict[str, Moments]:
    """The means and covariances of the inputs of a teacher's linear layers, from a file of Gram matrices.

    tensors: the tensor of the teacher's file for each parameter, by names; by default those of the parameters. Raises
    PlanError for statistics of another kind, and for those of layers that the teacher does not have.
    """
    if statistics.info.kind != "gram":
        raise PlanError(
            f"{statistics.path} holds {statistics.info.kind} statistics; expected Gram matrices, from which means and "
            "covariances follow. Collect them by `mergekit-lfm stats gram`"
        )
    names = {name: name for name, _ in teacher.named_parameters()} if tensors is None else tensors
    homes = {tensor: name.removesuffix(".weight") for name, tensor in names.items() if name.endswith(".weight")}
    layers = statistics.info.layers
    strange = [f"{name}, of the tensor {layer.weight}" for name, layer in layers.items() if layer.weight not in homes]
    if strange:
        raise PlanError(f"{statistics.path} has {shorten(strange)}; the teacher does not. Give its own statistics")
    return {homes[layer.weight]: _moments(statistics.read(name)) for name, layer in layers.items()}


@dataclass(frozen=True)
class Clusters:
    """Clusters of features. centres: [k, d]; axes: of each one, scaled by the spread along them [k, axes, d]."""

    centres: Tensor
    axes: Tensor

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Points near centres [count, d], each cluster as often: a centre, and a normal step along its axes.

        Source: Bhardwaj et al. 2019, arXiv 1905.07072, section 2.
        """
        chosen = torch.arange(count) % len(self.centres)
        steps = torch.randn(count, self.axes.shape[1], generator=generator)
        points = self.centres[chosen] + torch.einsum("na,nad->nd", steps, self.axes[chosen])
        return points.clamp(min=0) if bool((self.centres >= 0).all()) else points  # as features after a ReLU


def find_clusters(teacher: nn.Module, images: Tensor, *, each: int = 3, axes: int = 8, seed: int = 0) -> Clusters:
    """Clusters of the inputs of a teacher's head on images, `each` within every class that it finds, by k-means.

    axes: the most principal directions that are kept of each cluster. A class with fewer images than `each` has as many
    clusters as images.
    """
    heard = list[Tensor]()
    with frozen([teacher]), torch.no_grad(), hook_modules({last_linear(teacher): heard.append}, inputs=True):
        scores = torch.cat([logits(run(teacher, (part,))) for part in torch.split(images, PART)])
    classes, features = scores.argmax(-1).cpu(), torch.cat([x.flatten(1).cpu() for x in heard])
    centres, spread = list[Tensor](), list[Tensor]()
    for label in torch.unique(classes).tolist():
        rows = features[classes == label]
        for members in _k_means(rows, min(each, len(rows)), seed_of(seed, "clusters", label)):
            centre = members.mean(0)
            _, sizes, directions = torch.linalg.svd(members - centre, full_matrices=False)
            wide = torch.zeros(axes, rows.shape[1])
            kept = min(axes, len(sizes))
            wide[:kept] = directions[:kept] * sizes[:kept, None] / len(members) ** 0.5
            centres.append(centre)
            spread.append(wide)
    return Clusters(torch.stack(centres), torch.stack(spread))


def _k_means(rows: Tensor, count: int, seed: int) -> list[Tensor]:
    """The members of each cluster; empty ones are left out. Lloyd's algorithm from random rows."""
    start = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    centres = rows[start]
    for _ in range(ROUNDS):
        nearest = torch.cdist(rows, centres).argmin(1)
        groups = [rows[nearest == i] for i in range(count)]
        centres = torch.stack([x.mean(0) if len(x) else centres[i] for i, x in enumerate(groups)])
    return [x for x in groups if len(x)]


def with_records(terms: Mapping[str, float], records: Mapping[str, Moments]) -> dict[str, float]:
    """The terms for a teacher without BatchNorm: records take its place, with its weight."""
    if not records:
        raise PlanError("the teacher has no BatchNorm, and there are no records of its layers; give them (`stats`)")
    return {("records" if name == "bn" else name): weight for name, weight in terms.items()}
