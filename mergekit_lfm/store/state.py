"""The state of an input on the disk, which shows whether the file was changed while it was in use."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mergekit_lfm.errors import FormatError


@dataclass(frozen=True, slots=True)
class FileState:
    """A file's size in bytes, times and inode. The time of the last change of any kind, ctime, cannot be set back."""

    path: Path
    nbytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    def as_data(self, *, trust_times: bool) -> list[str | int]:
        """The state for JSON; trust_times: without what a copy of the file by path, size and time lacks."""
        data: list[str | int] = [str(self.path.resolve()), self.nbytes, self.mtime_ns]
        return data if trust_times else [*data, self.ctime_ns, self.inode]


def state_of(path: Path, fd: int | None = None) -> FileState:
    """The present state of a file, or of the one that a descriptor has open."""
    status = path.stat() if fd is None else os.fstat(fd)
    return FileState(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def refuse_changed(states: Iterable[FileState]) -> None:
    """Raise FormatError if a file is no longer in its state."""
    for state in states:
        if not state.path.exists() or state_of(state.path) != state:
            raise FormatError(
                f"{state.path} was changed since the merge was planned, so the output could mix old and new data; "
                "merge again with --no-resume"
            )
