"""Synthetic samples: saved as the arrays that every command reads, and as a grid to look at."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.extras import import_extra
from mergekit_lfm.recipe.synthesise_recipe import DRAWN
from mergekit_lfm.store.durable import replace_file

GRID, GAP, LEAST = 100, 1, 32  # images of a grid at most, pixels between them, and their least width when enlarged
WIDEST = 20  # columns of a grid
NO_IMAGE = -1  # an empty place of a grid


@dataclass(frozen=True)
class Samples:
    """Images [n, channels, h, w] without data, and the teacher's scores of them [n, classes]."""

    images: Tensor
    scores: Tensor

    @property
    def labels(self) -> Tensor:
        """The classes that the teacher scores best, [n]."""
        return self.scores.argmax(-1)


def save_samples(place: Path, samples: Samples, *, grid: bool = True) -> list[Path]:
    """Write `place`, an .npz file of `pixel_values` [n, channels, h, w] float32 and `labels` [n], and the files' paths.

    Every command that takes .npz data for classifiers reads it. grid: then also a .png of some beside it, by class,
    if they have 1 or 3 channels. Raises PlanError for another suffix.
    """
    if place.suffix != ".npz":
        raise PlanError(f"{place}: found the suffix {place.suffix or '(none)'}; expected .npz, arrays of numpy")
    replace_file(place, encode_samples(samples))
    if not grid or samples.images.shape[1] not in DRAWN:
        return [place]
    replace_file(place.with_suffix(".png"), draw_grid(samples))
    return [place, place.with_suffix(".png")]


def encode_samples(samples: Samples) -> bytes:
    """The content of an .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, pixel_values=samples.images.float().cpu().numpy(), labels=samples.labels.cpu().numpy())
    return buffer.getvalue()


def draw_grid(samples: Samples) -> bytes:
    """A .png of up to a hundred images, from the least of their pixels to the largest.

    A column for each class; with more than twenty classes, each in turn its next image, row by row.
    """
    pillow = import_extra("PIL.Image", "drawing images", "images")
    channels = samples.images.shape[1]
    if channels not in DRAWN:
        raise PlanError(f"the images have {channels} channels; expected 1 or 3 for a picture. Save them without a grid")
    rows = _by_class(samples.labels)
    cells = torch.tensor(rows).flatten()
    x = samples.images.cpu()[cells].float()
    x = (x - x.amin()) / (x.amax() - x.amin()).clamp(min=1e-12)
    zoom = max(1, math.ceil(LEAST / x.shape[-1]))
    x = x.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    x = torch.nn.functional.pad(x, (0, GAP, 0, GAP), value=1.0)
    x[cells == NO_IMAGE] = 1.0
    table = x.reshape(len(rows), -1, *x.shape[1:]).permute(2, 0, 3, 1, 4)
    table = table.flatten(3, 4).flatten(1, 2)  # [channels, h, w]
    pixels = (table * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    pillow.fromarray(pixels[..., 0] if channels == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _by_class(labels: Tensor) -> list[list[int]]:
    """The rows of a grid: the numbers of its images, `NO_IMAGE` for an empty place."""
    queues = [(labels == label).nonzero().flatten().tolist() for label in torch.unique(labels).tolist()]
    columns, longest = min(len(queues), WIDEST), max(map(len, queues))
    turns = [queue[i] if i < len(queue) else NO_IMAGE for i in range(longest) for queue in queues]
    if len(queues) > WIDEST:
        turns = [number for number in turns if number != NO_IMAGE]
    turns = turns[: GRID // columns * columns]
    turns += [NO_IMAGE] * (-len(turns) % columns)
    return [turns[i : i + columns] for i in range(0, len(turns), columns)]
