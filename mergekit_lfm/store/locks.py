"""Lock a folder for one run: by the file system, or by a file beside the folder where that has no locks.

The file, FOLDER.lock, names its run: host, process, and the time at which the process started, since numbers of
processes are used again. A run that was killed leaves it; the next one on the same host takes it over.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.store.durable import write_all
from mergekit_lfm.store.files import name_file, read_text

WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of network file systems without a lock service
PAUSE_S = 0.1  # between looks for a lock
LONGEST = 1000  # bytes of a lock file
BUSY = "another run is writing {place}"


class BusyError(PlanError):
    """Another run has the lock of a folder."""


@contextmanager
def lock_folder(folder: Path, wait_s: float = 0) -> Iterator[None]:
    """Keep other runs out of the folder within this block. Raises BusyError if another has it for `wait_s` seconds."""
    until = time.monotonic() + wait_s
    while True:
        with ExitStack() as stack:
            try:
                stack.enter_context(_lock_now(folder))
            except BusyError:
                if time.monotonic() >= until:
                    raise
            else:
                yield
                return
        time.sleep(PAUSE_S)


@contextmanager
def _lock_now(folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        fd = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, fd)
        busy = BusyError(f"{BUSY}; {{cure}}", place=folder, cure="wait for it, or choose another output")
        try:
            with name_file(folder):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            stack.enter_context(_hold(folder.with_name(f"{folder.name}.lock"), folder))
        if not folder.exists() or os.fstat(fd).st_ino != folder.stat().st_ino:
            raise busy  # it has just published the folder
        yield


@contextmanager
def lock_parts(folder: Path, wait_s: float) -> Iterator[None]:
    """Keep the other parts of a run out of a folder within this block, also those on other machines.

    By a lock on a file beside it: network file systems lock folders for one machine alone. Raises BusyError if another
    part has it for `wait_s` seconds, PlanError if its file system has no locks.
    """
    path, until = parts_lock(folder), time.monotonic() + wait_s
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with name_file(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            if hold(fd, needed=path):
                if path.exists() and os.fstat(fd).st_ino == path.stat().st_ino:  # else its folder was published
                    yield
                    return
                continue
        finally:
            os.close(fd)
        if time.monotonic() >= until:
            raise BusyError(f"{BUSY}; {{cure}}", place=folder, cure="wait for it, and start this part again")
        time.sleep(PAUSE_S)


def parts_lock(folder: Path) -> Path:
    """The file by which parts lock a folder."""
    return folder.with_name(f"{folder.name}.parts")


def hold(fd: int, needed: Path | None = None) -> bool:
    """Lock an open file for as long as it is open; False if another run has it.

    True, too, on a file system without locks. needed: the file's path, to raise PlanError there.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        if needed is not None:
            sentence = "{place} is on a file system without locks, which several runs need; {cure}"
            raise PlanError(sentence, place=needed, cure="leave --partition out, or mount it with locks") from None
    return True


@contextmanager
def _hold(path: Path, folder: Path) -> Iterator[None]:
    """Keep other runs out by a lock file."""
    ours = f"{socket.gethostname()} {os.getpid()} {_start_of(os.getpid())}"
    if not _create(path, ours):
        theirs = _read(path)
        if not (_is_gone(theirs) and _take_away(path, theirs) and _create(path, ours)):
            host, pid = [*theirs.split(), "?", "?"][:2]
            raise BusyError(
                f"{BUSY}: {{found}}; {{cure}}",
                place=folder,
                found=f"{path} is the lock of process {pid} on {host}",
                cure="wait for it, choose another output, or delete that file if the process has ended",
            )
    try:
        yield
    finally:
        if _read(path) == ours:
            path.unlink()


def _create(path: Path, owner: str) -> bool:
    """Make the lock file; False if there is one."""
    with name_file(path):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            write_all(fd, owner.encode())
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(fd)
    return True


def _read(path: Path) -> str:
    """The content of a lock file, "" without a readable one."""
    with suppress(FileNotFoundError, FormatError, UnicodeDecodeError):
        return read_text(path, LONGEST)
    return ""


def _is_gone(owner: str) -> bool:
    """True if the process that a lock file names has ended; False if that cannot be known."""
    try:
        host, pid, start = owner.split()
        if host != socket.gethostname():
            return False
        os.kill(int(pid), 0)
        return _start_of(int(pid)) != start
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError, OverflowError):  # another user's, or not a lock of ours
        return False


def _start_of(pid: int) -> str:
    """The time at which a process started, in the units of its system. Raises ProcessLookupError without one."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        raise ProcessLookupError from None
    return text.rpartition(")")[2].split()[19]


def _take_away(path: Path, owner: str) -> bool:
    """Remove the lock file of a run that has ended; False if another run did so first."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        path.rename(aside)  # only one run succeeds
    except FileNotFoundError:
        return False
    if _read(aside) != owner:  # the run that did so first has its own lock there now
        aside.rename(path)
        return False
    aside.unlink()
    return True
