"""Images in data files: with labels, in a folder for each class or in lines; and with texts, in lines.

Lines are JSONL of {"image": "a.png", "label": 0}, or have one image or a list of them beside a text. Paths are relative
to the file. The classes of a folder are those of the model by their names, if it has all of them, else the numbers of
the names in order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from mergekit_lfm.errors import FormatError, shorten
from mergekit_lfm.runtime.lines import first_line, is_text, read_objects
from mergekit_lfm.store.files import digest_file

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class LabelledImage(NamedTuple):
    """An image's file, and its class."""

    path: Path
    label: int


def find_images(path: Path, classes: Mapping[str, int] | None = None) -> list[LabelledImage] | None:
    """The images of a folder, or of a file of lines; None for a file of other data. classes: those of the model.

    Raises FormatError for a folder without classes, for other files in it, for wrong lines, and for missing images.
    """
    if path.is_dir():
        return _in_folder(path, classes or {})
    if not has_images(path):
        return None
    expected = 'an object {"image": "a.png", "label": 0} on each line, and the image beside the file'
    return read_objects(path, lambda entry, _: _read(entry, path.parent), expected)


def digest_data(path: Path) -> str:
    """xxh3-128 of a data file's content, in hex; of images with the names of their folders, and their own content."""
    if not path.is_dir() and not has_images(path):
        return digest_file(path)
    files = [image.path for image in find_images(path) or ()] if path.is_dir() else _files_in_lines(path)
    parts = [] if path.is_dir() else [digest_file(path)]
    parts += [f"{file.parent.name}/{file.name} {digest_file(file)}" for file in files]
    return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())


def _files_in_lines(path: Path) -> list[Path]:
    """The images that lines name and that are there; whoever reads the lines reports the others."""
    found: list[list[Path]] = read_objects(path, lambda entry, _: _named(entry, path.parent), "JSON objects")
    return [file for files in found for file in files if file.is_file()]


def images_of(entry: Mapping[str, Any], folder: Path) -> list[Path] | str:
    """The image or images of a line, or a description of its problem."""
    images = entry.get("image")
    several = isinstance(images, list)
    if not (several and images and all(map(is_text, images))) and not is_text(images):
        return 'no "image", or an empty one'
    files = _named(entry, folder)
    missing = [str(file) for file in files if not file.is_file()]
    return f"there is no {shorten(missing, 3)}" if missing else files


def _named(entry: Mapping[str, Any], folder: Path) -> list[Path]:
    images = entry.get("image")
    return [folder / name for name in (images if isinstance(images, list) else [images]) if isinstance(name, str)]


def has_images(path: Path) -> bool:
    """Whether the first line of a file of JSON lines has an image."""
    return first_line(path).get("image") is not None


def _read(entry: Mapping[str, Any], folder: Path) -> LabelledImage | str:
    label = entry.get("label")
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        return f'"label" is {json.dumps(label)}, not a whole number from 0'
    found = images_of(entry, folder)
    if isinstance(found, list) and len(found) > 1:
        return f"{len(found)} images for one label"
    return found if isinstance(found, str) else LabelledImage(found[0], label)


def _in_folder(folder: Path, classes: Mapping[str, int]) -> list[LabelledImage]:
    places = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    names = [path.name for path in places if path.is_dir()]
    numbers = classes if names and all(name in classes for name in names) else {n: i for i, n in enumerate(names)}
    files = [path for place in places if place.is_dir() for path in sorted(place.iterdir()) if path.name[0] != "."]
    wrong = [path for path in places if not path.is_dir()]
    wrong += [path for path in files if path.suffix.lower() not in SUFFIXES or not path.is_file()]
    if wrong or not files:
        found = shorten([str(path.relative_to(folder)) for path in wrong], 5) if wrong else "none"
        raise FormatError(
            f"{folder}: expected a folder for each class with images in it ({', '.join(SUFFIXES)}), and found {found}; "
            "move other files away"
        )
    return [LabelledImage(path, numbers[path.parent.name]) for path in files]
