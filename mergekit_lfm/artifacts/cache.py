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
    """What a result that is kept says of the device: its kind, None of the CPU. PlanError where it is not there."""
    kind = find_device(device).type
    return None if kind == "cpu" else kind


class Saved(Protocol):
    """What can be written to a file."""

    def save(self, path: Path, /) -> None: ...


T = TypeVar("T", bound=Saved)


def load_or_make(kept: Path, make: Callable[[], T], opened: Callable[[Path], T]) -> T:
    """What a file of the cache holds; where it is not there, or damaged, what is made, as a file then holds it."""
    try:
        return opened(kept)
    except (FileNotFoundError, FormatError):
        pass
    made = make()
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        ours = kept.with_name(f"{kept.stem}.{os.getpid()}.safetensors")  # other merges may make the same one now
        made.save(ours)
        ours.rename(kept)
    except OSError:  # without it the next run makes it again
        with TemporaryDirectory() as folder:  # what is used is what a file holds, here as there
            made.save(Path(folder) / kept.name)
            return opened(Path(folder) / kept.name)
    return opened(kept)


def key_of(asked: list[Any], device: str) -> str:
    """The name under which a result is kept: a digest of what it depends on, which is JSON-able, and of the device."""
    kind = kind_of(device)
    return xxhash.xxh3_128_hexdigest(json.dumps(asked if kind is None else [*asked, kind]).encode())
