"""Files that survive a crash: sync folders, replace files whole or not at all, lock folders for one run."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

from mergekit_lfm.errors import PlanError
from mergekit_lfm.tensors import naming

_fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)


def sync_folder(folder: Path) -> None:
    """Make creations, renames and removals in the folder permanent."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Replace the file's content atomically: a reader sees either the old or the new one, whole.

    data: all of it, or its parts in order.
    """
    with naming(path):
        temporary = path.with_name(path.name + ".tmp")
        try:
            with temporary.open("wb") as file:
                file.writelines([data] if isinstance(data, bytes) else data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def check_new_file(path: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Raises PlanError if a new file must not be written there, such as over an input or into an input's folder."""
    target = path.resolve()
    for source in inputs:
        folder = source.resolve()
        if target == folder or (folder.is_dir() and target.is_relative_to(folder)):
            raise PlanError(f"the output {path} lies in the input {source}, which is only read; choose another output")
    if target.exists() and not target.is_file():
        raise PlanError(f"{path} is not a file, expected the name of one to write; choose another output")
    if path.exists() and not overwrite:
        raise PlanError(f"{path} exists; choose another output, or use --overwrite")
    if not target.parent.is_dir():
        raise PlanError(f"the folder {path.parent} for {path.name} does not exist; make it, or choose another output")
    if not os.access(target.parent, os.W_OK):
        raise PlanError(f"the folder {path.parent} is not writable; choose another output")


def lock_folder(folder: Path) -> int:
    """A descriptor of the folder, locked until it is closed. Raises PlanError while another run has the lock."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not folder.exists() or os.fstat(fd).st_ino != folder.stat().st_ino:
            raise BlockingIOError
    except BlockingIOError:
        os.close(fd)
        raise PlanError(f"another run is writing {folder}; wait for it, or choose another output") from None
    return fd


def partial_of(out: Path) -> Path:
    """The folder OUT.partial, which becomes OUT once it is complete."""
    named = out if out.name else out.resolve()  # "." has no name of its own
    return named.with_name(f"{named.name}.partial")


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
    if nbytes and _fallocate is not None and _fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)):
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise OSError(number, os.strerror(number))
