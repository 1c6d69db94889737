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
from mergekit_lfm.store.durable import replace_file

GRID, GAP, LEAST = 100, 1, 32  # images of a grid at most, pixels between them, and their least width when enlarged


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

    Every command that takes .npz data for classifiers reads it. grid: also a .png of the first hundred beside it, by
    class. Raises PlanError for another suffix, or images of other than 1 or 3 channels for a grid.
    """
    if place.suffix != ".npz":
        raise PlanError(f"{place}: found the suffix {place.suffix or '(none)'}; expected .npz, arrays of numpy")
    picture = draw_grid(samples) if grid else None
    buffer = io.BytesIO()
    np.savez(buffer, pixel_values=samples.images.float().cpu().numpy(), labels=samples.labels.cpu().numpy())
    replace_file(place, buffer.getvalue())
    if picture is None:
        return [place]
    replace_file(place.with_suffix(".png"), picture)
    return [place, place.with_suffix(".png")]


def draw_grid(samples: Samples) -> bytes:
    """A .png of up to a hundred images, a column for each class, from the least of their pixels to the largest."""
    pillow = import_extra("PIL.Image", "drawing images", "images")
    count, channels = samples.images.shape[:2]
    if channels not in (1, 3):
        raise PlanError(f"the images have {channels} channels; expected 1 or 3 for a picture. Save them without a grid")
    order = _by_class(samples.labels, min(count, GRID))
    x = samples.images[order].float().cpu()
    x = (x - x.amin()) / (x.amax() - x.amin()).clamp(min=1e-12)
    zoom = max(1, math.ceil(LEAST / x.shape[-1]))
    x = x.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    x = torch.nn.functional.pad(x, (0, GAP, 0, GAP), value=1.0)
    columns = math.ceil(math.sqrt(len(x)))
    rows = math.ceil(len(x) / columns)
    x = torch.cat([x, x.new_ones(rows * columns - len(x), *x.shape[1:])])
    table = x.reshape(rows, columns, *x.shape[1:]).permute(2, 0, 3, 1, 4)
    table = table.flatten(3, 4).flatten(1, 2)  # [channels, h, w]
    pixels = (table * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    pillow.fromarray(pixels[..., 0] if channels == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _by_class(labels: Tensor, count: int) -> list[int]:
    """The numbers of `count` images: of each class in turn its next one, so that a row has one of each."""
    queues = [(labels == label).nonzero().flatten().tolist() for label in torch.unique(labels).tolist()]
    turns = [queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue)]
    return turns[:count]
