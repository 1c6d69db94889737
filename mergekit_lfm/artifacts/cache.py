"""Artifacts that can be made again, kept by a digest of everything that they depend on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar

import xxhash

from mergekit_lfm.errors import FormatError
from mergekit_lfm.machine.devices import find_device


def kind_of(device: str) -> str | None:
    """The kind of device that a kept result records, None for the CPU. Raises PlanError if it does not exist."""
    kind = find_device(device).type
    return None if kind == "cpu" else kind


class Saved(Protocol):
    """An artifact that can be written to a file."""

    def save(self, path: Path, /) -> None: ...


T = TypeVar("T", bound=Saved)


def load_or_make(kept: Path, make: Callable[[], T], load: Callable[[Path], T]) -> T:
    """Load the cached file; if it is missing or damaged, make the artifact, save it, load that."""
    try:
        return load(kept)
    except (FileNotFoundError, FormatError):
        pass
    made = make()
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        ours = kept.with_name(f"{kept.stem}.{os.getpid()}.safetensors")  # other merges may make the same one now
        made.save(ours)
        ours.rename(kept)
    except OSError:  # without it the next run makes it again
        with TemporaryDirectory() as folder:  # the artifact as a file holds it, as from the cache
            made.save(Path(folder) / kept.name)
            return load(Path(folder) / kept.name)
    return load(kept)


def key_of(request: list[Any], device: str) -> str:
    """The name of a kept result: a digest of the request, as JSON, and of the kind of device."""
    kind = kind_of(device)
    return xxhash.xxh3_128_hexdigest(json.dumps(request if kind is None else [*request, kind]).encode())
