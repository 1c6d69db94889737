"""Images as examples of a classifier: read, and made the model's inputs, when a batch has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_lfm.errors import FormatError, reason
from mergekit_lfm.machine.extras import import_extra
from mergekit_lfm.runtime.images import LabelledImage
from mergekit_lfm.runtime.lines import refuse
from mergekit_lfm.runtime.load import image_processor
from mergekit_lfm.train.examples import Examples

if TYPE_CHECKING:
    from mergekit_lfm.runtime.load import Loaded

BROKEN = (OSError, ValueError, SyntaxError)  # the errors of Pillow for files that it cannot read


@dataclass(frozen=True)
class Reading:
    """Makes an image's path the model's inputs. process: the image processor; describe: all that determines it."""

    process: Callable[[Any], dict[str, Tensor]]
    describe: str

    def __call__(self, item: Mapping[str, Tensor], _: torch.Generator) -> dict[str, Tensor]:
        """The inputs of the model, such as `pixel_values`, with the label."""
        path = bytes(item["image"].tolist()).decode()
        try:
            with _pillow().open(path) as image:
                labels = {name: x for name, x in item.items() if name != "image"}
                return {**self.process(image.convert("RGB")), **labels}
        except BROKEN as error:
            raise FormatError(f"{path}: an image that cannot be read ({reason(error)}); replace or remove it") from None

    def __repr__(self) -> str:
        return self.describe


def picture_examples(path: Path, images: Sequence[LabelledImage], loaded: Loaded) -> Examples:
    """The images as examples. Raises FormatError for damaged ones, and for a model without an image processor."""
    process, describe = image_processor(loaded)
    problems = list[str]()
    for image in images:
        try:
            with _pillow().open(image.path) as file:
                file.verify()
        except BROKEN as error:
            problems.append(f"{image.path.name}: {reason(error)}")
    if problems:
        refuse(path, problems, "images that can be read")
    items = [
        {
            "image": torch.tensor([*str(image.path.absolute()).encode()], dtype=torch.uint8),
            "labels": torch.tensor(image.label),
        }
        for image in images
    ]
    return Examples(items, change=Reading(process, describe))


def _pillow() -> Any:
    return import_extra("PIL.Image", "reading images", "images")
