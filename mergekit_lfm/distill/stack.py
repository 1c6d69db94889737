"""A generator in groups, one for each size of the teachers' layers, and what joins its features to theirs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from mergekit_lfm.distill.generators import WIDTH
from mergekit_lfm.distill.passes import frozen
from mergekit_lfm.runtime.hooks import hook_modules
from mergekit_lfm.runtime.load import run

Size = tuple[int, int]  # height and width of a layer's outputs


class Stack(nn.Module):
    """From latent numbers [n, latent] to features of growing sizes, and from the last ones to images [n, *shape].

    The group of each size reads the features of the one before. Source: Ye et al. 2020, arXiv 2003.09088, equation 2.
    """

    classes = 0  # numbers for a class after the latent ones

    def __init__(
        self,
        shape: tuple[int, int, int],
        sizes: Sequence[Size],
        *,
        latent: int = 32,
        low: float = 0.0,
        high: float = 1.0,
    ) -> None:
        super().__init__()
        self.shape, self.sizes, self.latent, self.low, self.high = shape, tuple(sizes), latent, low, high
        height, width = self.sizes[0]
        first = nn.Sequential(nn.Linear(latent, WIDTH * height * width), nn.Unflatten(1, (WIDTH, height, width)))
        ends = [nn.Sequential(nn.BatchNorm2d(WIDTH), nn.LeakyReLU(0.2)) for _ in sizes]
        grown = [nn.Sequential(nn.Upsample(size=size), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)) for size in sizes[1:]]
        self.groups = nn.ModuleList(nn.Sequential(*pair) for pair in zip([first, *grown], ends, strict=True))
        self.last = nn.Sequential(nn.Upsample(size=shape[1:]), nn.Conv2d(WIDTH, shape[0], 3, padding=1))

    def features(self, latents: Tensor, count: int | None = None) -> list[Tensor]:
        """The features of the first `count` groups, of all without it: [n, width, *size] each."""
        found, x = list[Tensor](), latents
        for group in self.groups[:count]:
            x = group(x)
            found.append(x)
        return found

    def draw(self, features: Sequence[Tensor]) -> Tensor:
        """The images of the features of all groups."""
        out: Tensor = self.low + (self.high - self.low) * self.last(features[-1]).sigmoid()
        return out

    def forward(self, latents: Tensor) -> Tensor:
        """The images of latent numbers."""
        return self.draw(self.features(latents))


class Filter(nn.Module):
    """From features [n, channels, h, w] to those of another model at the same size: its channels, each with a share.

    The shares are of the mean over the places. Source: Ye et al. 2020, arXiv 2003.09088, equation 9: pooling and two
    linear layers; a convolution of single places before them, since channels differ.
    """

    def __init__(self, channels: int, wanted: int) -> None:
        super().__init__()
        self.change = nn.Conv2d(channels, wanted, 1)
        self.shares = nn.Sequential(nn.Linear(wanted, wanted), nn.ReLU(), nn.Linear(wanted, wanted), nn.Sigmoid())

    def forward(self, features: Tensor) -> Tensor:
        """The other model's features."""
        x = self.change(features)
        out: Tensor = x * self.shares(x.mean((2, 3)))[..., None, None]
        return out


def find_cuts(model: nn.Module, images: Tensor) -> dict[Size, tuple[nn.Module, int]]:
    """The last module with outputs [n, channels, h, w] of each size, and its channels. Modules are called once each."""
    calls = list[tuple[nn.Module, object]]()

    def note(module: nn.Module, x: object) -> None:
        calls.append((module, x))

    with torch.no_grad(), frozen([model]), hook_modules({each: partial(note, each) for each in model.modules()}):
        run(model, (images,))
    counts = Counter(module for module, _ in calls)
    return {
        (x.shape[2], x.shape[3]): (module, x.shape[1])
        for module, x in calls
        if isinstance(x, Tensor) and x.ndim == 4 and min(x.shape[2:]) > 1 and counts[module] == 1
    }


def features_at(model: nn.Module, cut: nn.Module, images: Tensor, given: Mapping[nn.Module, Tensor]) -> Tensor:
    """The outputs of a module of a model for images. given: outputs of earlier modules, in place of their own."""
    heard = list[Tensor]()
    with replacing(given), hook_modules({cut: heard.append}):
        run(model, (images,))
    return heard[-1]


@contextmanager
def replacing(given: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Within it modules give these outputs in place of their own."""

    def put(x: Tensor, _: object) -> Tensor:
        return x

    with hook_modules({module: partial(put, x) for module, x in given.items()}):
        yield
