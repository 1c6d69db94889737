"""Processors of images, alone and with texts, that a model's folder has: loaded from local files, without its code."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mergekit_lfm.errors import FormatError, PlanError, reason
from mergekit_lfm.runtime.load import OURS, image_text_class, import_transformers, loading, without_noise
from mergekit_lfm.store.files import name_file

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lfm.runtime.load import Loaded

IMAGES = "preprocessor_config.json"  # the image processor's file
PROCESSOR = "processor_config.json"  # the file of the processor of images and texts, perhaps with that one in it


def image_processor(loaded: Loaded) -> tuple[Callable[[Any], dict[str, Tensor]], str]:
    """From an image to the inputs of a model, each without the axis of examples; and all that determines them, as text.

    Raises FormatError for a model without an image processor.
    """
    transformers, folder = import_transformers(), loaded.checkpoint.path
    if not (folder / IMAGES).is_file():
        raise FormatError(
            f"the data are images, and {folder} has no {IMAGES}; expected one, which says how the model takes them. "
            "Save the model's image processor there"
        )
    with without_noise(transformers), loading(folder, loaded.task):
        processor = transformers.AutoImageProcessor.from_pretrained(folder, **OURS)

    def process(image: Any) -> dict[str, Tensor]:
        return {name: x[0] for name, x in processor(images=image, return_tensors="pt").items()}

    return process, processor.to_json_string()


def image_text_processor(loaded: Loaded) -> Any:
    """The processor of transformers that makes images and a text the inputs of a model of both.

    Raises PlanError for a model of texts alone, FormatError for one without the processor's files, or whose processor
    names no token that stands for an image.
    """
    transformers, folder = import_transformers(), loaded.checkpoint.path
    kind = image_text_class(loaded.model.config)
    if kind is None or not isinstance(loaded.model, kind):
        raise PlanError(
            f"the data are images with texts, and {folder} is a {type(loaded.model).__name__}, which takes texts "
            'alone; expected a model of both, such as LLaVA. Give one, or lines without "image"'
        )
    if not any((folder / name).is_file() for name in (PROCESSOR, IMAGES)):
        raise FormatError(
            f"the data are images with texts, and {folder} has neither {PROCESSOR} nor {IMAGES}; expected the files of "
            "the model's processor. Save it there, by its save_pretrained"
        )
    try:
        with without_noise(transformers), name_file(folder):
            processor = transformers.AutoProcessor.from_pretrained(folder, **OURS)
    except (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise FormatError(
            f"{folder}: its processor of images and texts cannot be loaded: {reason(error)}; expected one of the "
            "installed transformers, with the libraries that it needs. Install these, or give another model"
        ) from error
    if not (hasattr(processor, "image_processor") and getattr(processor, "image_token", None)):
        raise FormatError(
            f"{folder}: its processor is a {type(processor).__name__}, which has no image processor or names no token "
            "for images; expected one such as LlavaProcessor. Save the model's own there"
        )
    return processor
