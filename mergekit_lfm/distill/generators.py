"""Small networks that training without data needs: a generator of images, and readers of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
WIDTH = 32  # channels at half the size and below; half as many at the full size
FINEST = 2  # times that the height and the width are doubled


class Generator(nn.Module):
    """From latent numbers [n, latent] to images [n, *shape] with pixels between low and high.

    A linear layer to a quarter of the height and width, two steps that double both, and convolutions between them: the
    form of DAFL's. classes: how many numbers for a class come after the latent ones; 0 for a generator without.
    """

    def __init__(
        self, shape: tuple[int, int, int], *, latent: int = 32, classes: int = 0, low: float = 0.0, high: float = 1.0
    ) -> None:
        super().__init__()
        self.shape, self.latent, self.classes, self.low, self.high = shape, latent, classes, low, high
        self.start = tuple(-(-side // 2**FINEST) for side in shape[1:])
        self.first = nn.Linear(latent + classes, WIDTH * self.start[0] * self.start[1])
        self.body = nn.Sequential(
            nn.BatchNorm2d(WIDTH),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.BatchNorm2d(WIDTH),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(WIDTH, WIDTH // 2, 3, padding=1),
            nn.BatchNorm2d(WIDTH // 2),
            nn.LeakyReLU(0.2),
            nn.Conv2d(WIDTH // 2, shape[0], 3, padding=1),
        )

    def forward(self, latents: Tensor) -> Tensor:
        """The images of latent numbers, with those for a class after them if it has some."""
        x = self.body(self.first(latents).unflatten(1, (WIDTH, *self.start)))
        _, height, width = self.shape
        out: Tensor = self.low + (self.high - self.low) * x[..., :height, :width].sigmoid()
        return out


class Reader(nn.Module):
    """From images [n, *shape] to numbers [n, outputs]: a decoder of latent numbers, or a critic of images."""

    def __init__(self, shape: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(shape[0], WIDTH, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.LazyLinear(outputs),
        )
        self.layers(torch.zeros(1, *shape))

    def forward(self, images: Tensor) -> Tensor:
        """The numbers."""
        out: Tensor = self.layers(images)
        return out


def build(make: Callable[[], M], seed: int) -> M:
    """A module whose random start depends on the seed alone; torch's own random numbers are as before afterwards."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return make()


@torch.no_grad()
def renew(module: nn.Module, seed: int) -> None:
    """Give a module the random start of a seed, in place."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for each in module.modules():
            reset = getattr(each, "reset_parameters", None)
            if callable(reset):
                reset()
