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
from mergekit_lfm.runtime.processors import image_processor
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
        (path,) = read_paths(item["image"])
        labels = {name: x for name, x in item.items() if name != "image"}
        return {**self.process(open_image(path)), **labels}

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
            "image": write_paths([image.path]),
            "labels": torch.tensor(image.label),
        }
        for image in images
    ]
    return Examples(items, change=Reading(process, describe))


def write_paths(paths: Sequence[Path]) -> Tensor:
    """Files of images as a tensor of bytes, so that an example can hold them."""
    return torch.tensor([*"\0".join(str(path.absolute()) for path in paths).encode()], dtype=torch.uint8)


def read_paths(paths: Tensor) -> list[str]:
    """The files in such a tensor."""
    return bytes(paths.tolist()).decode().split("\0")


def open_image(path: str | Path) -> Any:
    """An image in RGB. Raises FormatError for one that cannot be read."""
    try:
        with _pillow().open(path) as image:
            return image.convert("RGB")
    except BROKEN as error:
        raise FormatError(f"{path}: an image that cannot be read ({reason(error)}); replace or remove it") from None


def _pillow() -> Any:
    return import_extra("PIL.Image", "reading images", "images")
