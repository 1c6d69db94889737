"""A model that is elsewhere, on the Hub or in a bucket, in one state that does not change.

Headers are read there; files come into a folder of the cache when they are needed whole, and ranges of them otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.machine.resources import free_space
from mergekit_lfm.store.tensors import MAX_HEADER

AT_PLANNING = ("config.json", "adapter_config.json", "modules.json", "*.index.json", "README.md")
FIRST_RANGE = 100_000  # bytes: the headers of most files are shorter


class Snapshot(ABC):
    """A model elsewhere. folder: the present or future one of its files in the cache; sizes: of its files, in bytes.

    commit: a name for the state, which no other has. repo: its repository on the Hub, None if it is not there. listed:
    True if `sizes` has the files that are there; else it has those in the cache.
    """

    folder: Path
    sizes: Mapping[str, int]
    commit: str
    repo: str | None
    listed: bool

    @property
    def public(self) -> str:
        """The name of the state as documents of an output have it, which may not name private places."""
        return str(self)

    def lacking(self, names: Iterable[str]) -> list[str]:
        """The files among `names` that are not in the cache."""
        return [name for name in names if not (self.folder / name).exists()]

    @property
    @abstractmethod
    def cache(self) -> tuple[str, Path, str]:
        """The cache of `folder`: its name, its folder, and the variable that moves it to another disk."""

    def check_room(self, nbytes: int) -> None:
        """Raise PlanError if the disk of the cache has no room for `nbytes`."""
        free, (name, folder, variable) = free_space(self.folder), self.cache
        if nbytes > free:
            needed, has = f"{nbytes / 1e9:,.3g} GB more in {name}, {folder}", f"{free / 1e9:,.3g} GB are free"
            raise PlanError(f"the models need {needed}, where {has}; make room, or set {variable} to another disk")

    @abstractmethod
    def fetch(self, names: Collection[str], progress: Progress = SILENCE) -> None:
        """Bring the files into the cache that are not there, several at a time. A terminal has bars.

        Raises PlanError if the other side refuses or the disk is full, ConnectionError if the connection fails,
        FormatError if a file is not the one that was listed.
        """

    @abstractmethod
    def read_start(self, name: str, nbytes: int) -> bytes:
        """The first bytes of a file. Raises as `fetch` does."""

    @abstractmethod
    def read_range(self, name: str, start: int, stop: int) -> memoryview:
        """These bytes of a file, from where it is, not from the cache. Raises as `fetch` does."""

    def head(self, name: str) -> tuple[bytes, int]:
        """The bytes of a safetensors file up to its data (if not a header, the first ones), and the file's size."""
        size = self.sizes[name]
        data = self.read_start(name, min(size, FIRST_RANGE))
        length = 8 + int.from_bytes(data[:8], "little")
        if len(data) < length <= min(size, MAX_HEADER + 8):
            data = self.read_start(name, length)
        return data, size
