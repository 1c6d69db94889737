"""A model in a bucket, in the state that a listing shows: its files, their headers, and copies in the cache.

Every request names the state of its file, so that a file that is changed meanwhile is an error, never a mixture.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, final

import xxhash

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.machine.resources import cache_folder
from mergekit_lfm.store.buckets.client import again, import_obstore, open_store
from mergekit_lfm.store.buckets.names import BucketName
from mergekit_lfm.store.files import open_file
from mergekit_lfm.store.folder import leads_away
from mergekit_lfm.store.locks import PAUSE_S, hold
from mergekit_lfm.store.snapshot import AT_PLANNING, Snapshot
from mergekit_lfm.store.tensors import write_exactly

CHUNK = 16 << 20  # bytes of a request for a part of a file
AT_ONCE = 8  # requests
MOST_FILES = 100_000


@final
@dataclass(frozen=True)
class BucketSnapshot(Snapshot):
    """A folder in a bucket as it was listed. tags: of each file, which another state of it does not have."""

    name: BucketName
    commit: str
    folder: Path
    sizes: Mapping[str, int]
    tags: Mapping[str, str]
    repo: str | None = None
    listed: bool = True

    def __str__(self) -> str:
        return f"{self.name}@{self.commit}"

    @property
    def public(self) -> str:
        return f"{self.name.last}@{self.commit}"

    @property
    def cache(self) -> tuple[str, Path, str]:
        return "the cache", cache_folder("buckets"), "XDG_CACHE_HOME"

    def fetch(self, names: Collection[str], progress: Progress = SILENCE) -> None:
        lacking = self.lacking(dict.fromkeys(names))
        if not lacking:
            return
        needed = sum(self.sizes.get(name, 0) for name in lacking)
        self.check_room(needed)
        with ThreadPoolExecutor(AT_ONCE) as pool, progress.by_bytes(needed, f"downloading {self.name}") as advance:
            for name in lacking:
                self._bring(name, pool, advance)

    def copy_to(self, folder: Path, names: Iterable[str]) -> None:
        """Copy files into another folder, past the cache."""
        replace(self, folder=folder).fetch([*names])

    def _bring(self, name: str, pool: ThreadPoolExecutor, advance: Callable[[int], None]) -> None:
        """Copy a file into the cache; if another process does so now, wait for it."""
        path, size = self.folder / name, self._size(name)
        part = path.with_name(f"{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            while not hold(fd):
                time.sleep(PAUSE_S)
            if path.exists():  # the other process has made the file of it
                return
            os.ftruncate(fd, size)

            def copy(start: int) -> None:
                data = self.read_range(name, start, min(start + CHUNK, size))
                write_exactly(fd, start, data)
                advance(len(data))

            for _ in pool.map(copy, range(0, size, CHUNK)):
                pass
            os.fsync(fd)
            part.replace(path)
        finally:
            os.close(fd)

    def read_start(self, name: str, nbytes: int) -> bytes:
        path = self.folder / name
        if path.exists():
            with open_file(path) as file:
                return file.read(nbytes)
        return bytes(self.read_range(name, 0, nbytes)) if nbytes else b""

    def read_range(self, name: str, start: int, stop: int) -> memoryview:
        options: dict[str, Any] = {"range": (start, stop), "if_match": self.tags[name]}
        obstore, store = import_obstore(), open_store(self.name)
        data = memoryview(again(self.name, name, lambda: obstore.get(store, name, options=options).bytes()))
        if len(data) != stop - start:
            sentence = "{place}: found {found} bytes, expected {expected}; {cure}"
            numbers = {"found": f"{len(data):,}", "expected": f"{stop - start:,}"}
            raise FormatError(sentence, place=f"{self.name}/{name}", cure="run the command again", **numbers)
        return data

    def _size(self, name: str) -> int:
        if name not in self.sizes:
            raise PlanError("{place}: found no file {name}; {cure}", place=self.name, name=name, cure="put it there")
        return self.sizes[name]


def find_in_bucket(name: BucketName) -> BucketSnapshot:
    """The model in a folder, or in a file, of a bucket as it is now, with its configs and its card in the cache.

    Raises PlanError if nothing is there, or the store refuses; ConnectionError if it cannot be reached.
    """
    files = list_folder(name)
    if not files and "/" in name.path:
        folder = BucketName(name.scheme, name.bucket, name.path.rpartition("/")[0])
        if name.last in (beside := list_folder(folder)):
            name, files = folder, {name.last: beside[name.last]}
    if not files:
        sentence = "{place}: found nothing there; {cure}"
        raise PlanError(sentence, place=name, cure="give the address of a folder or a file in a bucket")
    state = xxhash.xxh3_128_hexdigest(repr(sorted((file, *entry) for file, entry in files.items())).encode())[:16]
    place = f"{name.last}-{xxhash.xxh3_64_hexdigest(str(name).encode())}"
    sizes = {file: size for file, (size, _) in files.items()}
    tags = {file: tag for file, (_, tag) in files.items()}
    snapshot = BucketSnapshot(name, state, cache_folder("buckets") / place / state, sizes, tags)
    snapshot.fetch([file for file in files if any(fnmatch(file, pattern) for pattern in AT_PLANNING)])
    return snapshot


def list_folder(name: BucketName) -> dict[str, tuple[int, str]]:
    """The sizes and tags of the files in a folder of a bucket, by name. Raises as `find_in_bucket` does."""

    def look() -> dict[str, tuple[int, str]]:
        files = dict[str, tuple[int, str]]()
        for page in import_obstore().list(open_store(name)):
            for entry in page:
                path = str(entry["path"])
                if path.endswith("/") or not path:  # stands for a folder
                    continue
                if leads_away(path) or not entry["e_tag"]:
                    sentence = "{place}: the store lists {found}, which is not the name of a file with a tag; {cure}"
                    raise FormatError(sentence, place=name, found=f"{path!r:.80}", cure="rename that object")
                files[path] = int(entry["size"]), str(entry["e_tag"])
            if len(files) > MOST_FILES:
                found, cure = f"over {MOST_FILES:,} files", "give the address of the model's own folder"
                raise PlanError("{place} has {found}; {cure}", place=name, found=found, cure=cure)
        return files

    return dict(again(name, "", look))
