"""OUT.partial: an unfinished statistics file, the record of its complete parts, and the sums of the current pass.

The file has its full size from the start and is unreadable until complete. `progress.json` names the units that are in
it, after their bytes are synced; `sums.safetensors`, replaced atomically from time to time, holds the current units'
sums over the first batches. So the next run can go on from these, whenever a run was killed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from mergekit_lfm.artifacts.statistics import StatisticsInfo
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.store.checkpoint import open_checkpoint
from mergekit_lfm.store.durable import leftovers, replace_file, reserve, sync_folder
from mergekit_lfm.store.files import name_file, read_json
from mergekit_lfm.store.formats import bytes_of
from mergekit_lfm.store.locks import lock_folder
from mergekit_lfm.store.places import partial_of
from mergekit_lfm.store.tensors import UNFINISHED, TensorSpec, encode_header, read_header, write_exactly

PROGRESS, SUMS, FILE = "progress.json", "sums.safetensors", "statistics.safetensors"
# Placeholders for counts not known yet, longer than any count, so that the header has room for them.
WIDEST_COUNT, WIDEST_NORM = 10**15, 1.2345678901234567e-300


class Partial:
    """OUT.partial while it is written. Use as a context manager; `publish` makes it OUT.

    facts: of the finished file, except its counts. done: counts and squares of the complete units.
    """

    def __init__(
        self, out: Path, facts: StatisticsInfo, units: Mapping[str, Mapping[str, tuple[int, ...]]], resume: bool
    ) -> None:
        self.out, self.folder = out, partial_of(out)
        self.specs = [TensorSpec(name, shape, "float32") for unit in units.values() for name, shape in unit.items()]
        header, self._offsets = encode_header(self.specs, facts.metadata())
        self._start, self._nbytes = len(header), len(header) + sum(spec.nbytes for spec in self.specs)
        self.key = xxhash.xxh3_128_hexdigest(header)
        self.done: dict[str, dict[str, Any]] = {}
        self._fd, self._held = -1, ExitStack()
        try:
            self._open(resume)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _open(self, resume: bool) -> None:
        check_partial_is_ours(self.out)
        self.folder.mkdir(exist_ok=True)
        self._held.enter_context(lock_folder(self.folder))
        file = self.folder / FILE
        complete = file.is_file() and file.stat().st_size == self._nbytes
        progress = _read_json(self.folder / PROGRESS)
        if resume and complete and progress.get("key") == self.key:
            self.done = progress["done"]
        else:
            self._start_over()
        self._fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        self._held.callback(os.close, self._fd)
        with name_file(file):
            write_exactly(self._fd, 0, memoryview(UNFINISHED))
            reserve(self._fd, self._nbytes)
            os.fsync(self._fd)
        sync_folder(self.folder)

    def _start_over(self) -> None:
        """Empty the folder, after resetting the record of its content."""
        self._record()
        for name in (SUMS, FILE):
            (self.folder / name).unlink(missing_ok=True)
        sync_folder(self.folder.parent)

    def _record(self) -> None:
        replace_file(self.folder / PROGRESS, json.dumps({"key": self.key, "done": self.done}).encode())
        sync_folder(self.folder)

    def write(self, entries: Mapping[str, Tensor], done: Mapping[str, dict[str, Any]]) -> None:
        """Write complete entries to the file, and record their units once the bytes are safe."""
        file = self.folder / FILE
        with name_file(file):
            for name, entry in entries.items():
                write_exactly(self._fd, self._offsets[name], bytes_of(entry.cpu().contiguous()))
            os.fsync(self._fd)
        self.done |= done
        self._record()
        (self.folder / SUMS).unlink(missing_ok=True)

    def save_sums(self, sums: Mapping[str, Tensor], batches: int) -> None:
        """Keep the sums over the first `batches` batches, in place of those kept before."""
        specs = [TensorSpec(name, tuple(total.shape), "float64") for name, total in sums.items()]
        header, offsets = encode_header(specs, {"key": self.key, "batches": str(batches)})
        path = self.folder / SUMS
        temporary = path.with_name(SUMS + ".tmp")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            with name_file(temporary):
                write_exactly(fd, 0, memoryview(header))
                for name, total in sums.items():
                    write_exactly(fd, offsets[name], bytes_of(total.cpu().contiguous()))
                os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(path)
        sync_folder(self.folder)

    def load_sums(self, sums: Mapping[str, Tensor]) -> int:
        """Fill the sums with saved ones of the same entries; returns their number of batches, 0 if none are saved."""
        try:
            metadata = read_header(self.folder / SUMS).metadata
            saved = open_checkpoint(self.folder / SUMS)
        except (OSError, FormatError):
            return 0
        if metadata.get("key") != self.key or saved.keys() != sums.keys():
            return 0
        for name, total in sums.items():
            total.copy_(saved.read(name).view(total.shape))
        return int(metadata["batches"])

    def publish(self, facts: StatisticsInfo) -> None:
        """Make the file readable, with its counts, and move it to OUT."""
        header, _ = encode_header(self.specs, facts.metadata())
        raw = header[8:].ljust(self._start - 8)
        with name_file(self.folder / FILE):
            write_exactly(self._fd, 8, memoryview(raw))
            os.fsync(self._fd)
            write_exactly(self._fd, 0, memoryview(len(raw).to_bytes(8, "little")))
            os.fsync(self._fd)
        (self.folder / FILE).rename(self.out)
        sync_folder(self.out.parent)
        shutil.rmtree(self.folder)
        sync_folder(self.out.parent)


def check_partial_is_ours(out: Path) -> None:
    """Raises PlanError if OUT.partial is not an unfinished statistics file of ours."""
    folder = partial_of(out)
    ours = folder.is_dir() and (bool(_read_json(folder / PROGRESS)) or not any(_content(folder)))
    if folder.exists() and not ours:
        raise PlanError(f"{folder} exists and is not an unfinished statistics file; move it away")


def _content(folder: Path) -> list[Path]:
    """The files in OUT.partial, except temporary ones of runs that were killed at their very start."""
    return sorted({*folder.iterdir()} - {*leftovers(folder)})


def clear(out: Path) -> None:
    """Remove the folder that a run killed at its very end left beside the complete OUT."""
    folder = partial_of(out)
    if folder.is_dir():
        with lock_folder(folder):
            shutil.rmtree(folder)
        sync_folder(out.parent)


def _read_json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        content = read_json(path)
        if isinstance(content, dict):
            return content
    return {}
