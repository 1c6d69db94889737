"""A small classifier of images with BatchNorm, or without it, and facts about it, for distillation without data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mergekit_lfm.distill.generators import build
from mergekit_lfm.distill.metadata import collect_records, find_clusters
from mergekit_lfm.distill.synthesise import Given

SHAPE = (1, 8, 8)
CLASSES = 4


class Small(nn.Module):
    """A convolution, perhaps BatchNorm, and a head over a hidden layer."""

    def __init__(self, norm: bool = True, width: int = 6, smooth: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.norm: nn.Module = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.act: nn.Module = nn.Sigmoid() if smooth else nn.ReLU()
        self.hidden = nn.Linear(width * 16, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.act(self.norm(self.conv(x))), 2).flatten(1)
        out: Tensor = self.head(self.act(self.hidden(x)))
        return out


def small(seed: int = 0, norm: bool = True, **options: bool) -> Small:
    """A model of random weights whose BatchNorm has the statistics of some images; in evaluation mode."""
    net = build(lambda: Small(norm, **options), seed)
    if isinstance(net.norm, nn.BatchNorm2d):
        net.norm.momentum = 1.0  # the statistics of these images alone
        net(some_images(64))
    return net.eval()


def some_images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def facts_about(net: nn.Module) -> Given:
    images = some_images(40, 7)
    return Given(collect_records(net, images), find_clusters(net, images, each=2, axes=3), some_images(64, 8))
