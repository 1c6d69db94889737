"""Files that survive a crash: sync folders, replace files whole or not at all, reserve space on the disk."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from mergekit_lfm.store.files import name_file

LEFTOVER = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")

_fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)


def sync_folder(folder: Path) -> None:
    """Make creations, renames and removals in the folder permanent."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with name_file(folder):
            os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Replace the file's content atomically: a reader sees either the old or the new one, whole.

    data: all of it, or its parts in order.
    """
    with name_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.tmp")  # others may write it too
        try:
            with temporary.open("xb") as file:
                file.writelines([data] if isinstance(data, bytes) else data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def leftovers(folder: Path) -> list[Path]:
    """The temporary files in a folder, and in those inside it, of runs that were killed in `replace_file`."""
    return [path for path in folder.rglob(".*.tmp") if LEFTOVER.fullmatch(path.name)]


def write_all(fd: int, data: bytes) -> None:
    """Append all of `data`."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def reserve(fd: int, nbytes: int) -> None:
    """Give the file its full size on the disk, so that a full disk shows before work starts.

    Uses the system call, because os.posix_fallocate writes every page on filesystems without it.
    """
    os.ftruncate(fd, nbytes)
    while nbytes and _fallocate is not None and _fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)):
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            return
        if number != errno.EINTR:  # Python repeats calls that a signal interrupts, but not those by ctypes
            raise OSError(number, os.strerror(number))
