"""Images in the wild: those of any kind that a teacher is surest of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mergekit_lfm.distill.passes import scores_in_parts
from mergekit_lfm.distill.samples import Samples
from mergekit_lfm.errors import PlanError

PART = 256


def choose_wild(teacher: nn.Module, images: Tensor, count: int) -> Samples:
    """The `count` images that the teacher is surest of, surest first; among equals the first ones.

    Source: Chen et al. 2021, CVPR (DFND): the least cross-entropy of the class that the teacher scores best.
    """
    if not 1 <= count <= len(images):
        raise PlanError(f"found {len(images)} images to choose from, expected at least {max(1, count)}; give more")
    scores = scores_in_parts(teacher, images, PART)
    losses = nn.functional.cross_entropy(scores, scores.argmax(-1), reduction="none")
    chosen = torch.sort(losses, stable=True).indices[:count]
    return Samples(images[chosen], scores[chosen])
