"""A bank of images with a teacher's scores: the last ones that were made, up to a number."""

from __future__ import annotations

import torch
from torch import Tensor


class Bank:
    """Images [n, channels, h, w] and scores [n, classes]; when it is full, the oldest ones make room."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.images, self.scores = torch.empty(0), torch.empty(0)

    def __len__(self) -> int:
        return len(self.images)

    def add(self, images: Tensor, scores: Tensor) -> None:
        """Add images."""
        if len(self):
            images, scores = torch.cat([self.images, images]), torch.cat([self.scores, scores])
        self.images, self.scores = images[-self.most :], scores[-self.most :]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random images with their scores; all of them, in random order, if it has fewer."""
        chosen = torch.randperm(len(self), generator=generator)[:count].to(self.images.device)
        return self.images[chosen], self.scores[chosen]
