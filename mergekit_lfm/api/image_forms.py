"""The form of the images that a saved classifier takes: their shape, and the range of their pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.runtime.processors import IMAGES
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.files import read_json

SIDES = (("height", "width"), ("shortest_edge", "shortest_edge"))  # of an image processor's size, by names


def image_form(
    model: Checkpoint, size: int | None, low: float | None, high: float | None
) -> tuple[tuple[int, int, int], tuple[float, float]]:
    """The shape of an image, and the range of its pixels, as the model takes them, by its files alone."""
    config, file = model.config, model.path / IMAGES
    processor = read_json(file) if file.is_file() else {}
    if not isinstance(processor, dict):
        raise FormatError(f"{file}: found {type(processor).__name__}; expected an image processor's settings by name")
    sides = _sides(size or config.get("image_size") or processor.get("crop_size") or processor.get("size"))
    if sides is None:
        raise PlanError(f"{model.path} does not say how large its images are; give the size")
    if low is None or high is None:
        least, most = pixel_range(processor, file)
        low, high = least if low is None else low, most if high is None else high
    if not (math.isfinite(low) and low < high < math.inf):
        raise PlanError(f"low is {low:g} and high {high:g}; expected a range of pixels. Correct them")
    return (int(config.get("num_channels", 3)), *sides), (low, high)


def pixel_range(processor: Mapping[str, Any], file: Path) -> tuple[float, float]:
    """The range that an image processor gives to pixels from 0 to 1. Raises FormatError for one that has none."""
    stated = [processor.get(name) for name in ("image_mean", "image_std")]
    if processor.get("do_normalize") is False or stated == [None, None]:
        return 0.0, 1.0
    means, spreads = (x if isinstance(x, list) else [x] for x in stated)
    numbers = all(isinstance(x, int | float) and math.isfinite(x) for x in (*means, *spreads))
    if not numbers or not means or len(means) != len(spreads) or min(spreads) <= 0:
        raise FormatError(
            f"{file}: found the image_mean {stated[0]} and the image_std {stated[1]}; expected as many numbers of "
            "both, the latter above 0. Correct them, or give the least and the largest value of a pixel"
        )
    pairs = [*zip(means, spreads, strict=True)]
    return min(-mean / spread for mean, spread in pairs), max((1 - mean) / spread for mean, spread in pairs)


def _sides(size: Any) -> tuple[int, int] | None:
    """The height and width in a number, a pair, or an image processor's size; None for another form."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping):
        found = next(((size[a], size[b]) for a, b in SIDES if a in size and b in size), None)
        return found and (int(found[0]), int(found[1]))
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) and len(size) == 2 else None
