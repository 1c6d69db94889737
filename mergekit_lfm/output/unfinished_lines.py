"""OUT.partial while a file of lines is made: its parts in order, each safe once it is written.

The next run of the same request goes on after the last whole part, whenever a run was killed.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.durable import leftovers, sync_folder, write_all
from mergekit_lfm.store.files import name_file, read_bytes
from mergekit_lfm.store.locks import lock_folder
from mergekit_lfm.store.places import partial_of

PARTS = "parts.jsonl"


class UnfinishedLines:
    """The parts of a file so far. Use as a context manager. Parts are JSON; request: the digest of all they depend on.

    Those of another request are dropped. Raises PlanError if OUT.partial holds something else, or another run has it.
    """

    def __init__(self, out: Path, request: str) -> None:
        self.folder, self.parts = partial_of(out), list[Any]()
        self._request, self._fd, self._held = request, -1, ExitStack()

    def __enter__(self) -> UnfinishedLines:
        _refuse_others(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(lock_folder(self.folder))
            self._open(self.folder / PARTS)
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the parts for the next run; without any, nothing."""
        if not self.parts:
            shutil.rmtree(self.folder)
        self._held.close()

    def _open(self, file: Path) -> None:
        """Read the parts, and cut off the rest of one that a kill has left."""
        head = json.dumps({"request": self._request}).encode() + b"\n"
        raw = read_bytes(file, most=None) if file.is_file() else b""
        lines = raw[: raw.rfind(b"\n") + 1].splitlines(keepends=True)
        lines = lines if lines[:1] == [head] else []
        self.parts = [json.loads(line) for line in lines[1:]]
        self._fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._held.callback(os.close, self._fd)
        with name_file(file):
            os.ftruncate(self._fd, sum(map(len, lines)))
            if not lines:
                write_all(self._fd, head)
            os.fsync(self._fd)
        sync_folder(self.folder)

    def add(self, part: Any) -> None:
        """Write the next part."""
        with name_file(self.folder / PARTS):
            write_all(self._fd, json.dumps(part).encode() + b"\n")
            os.fsync(self._fd)
        self.parts.append(part)


def drop_unfinished(out: Path) -> None:
    """Remove the parts once OUT is there, or what a run that was killed meanwhile has left of them."""
    folder = partial_of(out)
    if folder.is_dir() and not _has_others(folder):
        with lock_folder(folder):
            shutil.rmtree(folder)
        sync_folder(out.parent)


def _refuse_others(folder: Path) -> None:
    """Raise PlanError for a folder with something else than parts."""
    if (folder.exists() or folder.is_symlink()) and _has_others(folder):
        raise PlanError(f"{folder} exists and is not the beginning of an unfinished file; move it away")


def _has_others(folder: Path) -> bool:
    """True for a folder with something else than parts, and for anything that is not a folder."""
    return (
        folder.is_symlink() or not folder.is_dir() or bool({*folder.iterdir()} - {folder / PARTS, *leftovers(folder)})
    )
