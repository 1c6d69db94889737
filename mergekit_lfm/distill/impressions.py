"""Targets of images that are to be made: classes in equal numbers, or soft ones by the similarity of classes."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_lfm.train.examples import seed_of

SCALES = (1.0, 0.1)  # of the concentrations, half of the targets each: Nayak et al., section 4.1
LEAST = 1e-2  # of a concentration, so that it is one


def class_similarity(weight: Tensor) -> Tensor:
    """The cosines of the rows of a head's weight [classes, d]: how similar it takes two classes to be.

    Source: Nayak et al. 2019, arXiv 1905.08114, section 3.
    """
    rows = torch.nn.functional.normalize(weight, dim=-1)
    return rows @ rows.T


def concentrations(weight: Tensor) -> Tensor:
    """Each class's row of similarities, moved to [0, 1] by its least and largest; never below a hundredth."""
    similarity = class_similarity(weight)
    least, most = similarity.amin(-1, keepdim=True), similarity.amax(-1, keepdim=True)
    return ((similarity - least) / (most - least).clamp(min=1e-12)).clamp(min=LEAST)


def draw_impressions(weight: Tensor, count: int, seed: int) -> Tensor:
    """Soft targets [count, classes]: Dirichlet with each class's concentrations in turn, times 1 or 0.1."""
    rows = concentrations(weight.detach().float().cpu())
    numbers = torch.arange(count)
    scales = torch.tensor(SCALES)[numbers // len(rows) % len(SCALES)]
    with torch.random.fork_rng([]):
        torch.manual_seed(seed_of(seed, "impressions"))
        return torch.distributions.Dirichlet(rows[numbers % len(rows)] * scales[:, None]).sample()


def draw_classes(count: int, classes: int, seed: int) -> Tensor:
    """Classes [count], each as often as the others, in random order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, "classes")))
    return (torch.arange(count) % classes)[order]
