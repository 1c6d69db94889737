"""A folder has one run at a time, also on file systems without locks, where a file stands for one."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mergekit_lfm.errors import PlanError
from mergekit_lfm.store import locks
from mergekit_lfm.store.locks import lock_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to lock."""
    (tmp_path / "out.partial").mkdir()
    return tmp_path / "out.partial"


def refuse_locks(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """Let the file system refuse every lock."""

    def refuse(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock file of the folder, on a file system without locks."""
    refuse_locks(monkeypatch, errno.ENOLCK)
    return folder.with_name("out.partial.lock")


def test_a_locked_folder_is_refused(folder: Path) -> None:
    with lock_folder(folder):
        assert list(folder.parent.iterdir()) == [folder]
        with pytest.raises(PlanError, match=r"another run is writing .*out\.partial; wait"), lock_folder(folder):
            pass
    with lock_folder(folder):
        pass


@pytest.mark.parametrize("error", locks.WITHOUT_LOCKS, ids=errno.errorcode.get)
def test_without_locks_a_file_names_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    refuse_locks(monkeypatch, error)
    lock = folder.with_name("out.partial.lock")
    with lock_folder(folder):
        assert lock.read_text().split()[:2] == [socket.gethostname(), str(os.getpid())]
        message = f"{lock} is the lock of process {os.getpid()} on {socket.gethostname()}; wait .* delete that file"
        with pytest.raises(PlanError, match=message), lock_folder(folder):
            pass
    assert list(folder.parent.iterdir()) == [folder]


def test_other_failures_of_locks_name_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=re.escape(str(folder))) as raised, lock_folder(folder):
        pass
    assert raised.value.errno == errno.EIO


def ended_process() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("gone", ["ended", "its number is used again"])
def test_the_lock_of_a_killed_run_is_taken_over(folder: Path, lock: Path, gone: str) -> None:
    process = ended_process() if gone == "ended" else os.getpid()
    lock.write_text(f"{socket.gethostname()} {process} 1")
    with lock_folder(folder):
        assert lock.read_text().split()[1:] == [str(os.getpid()), locks._start_of(os.getpid())]
    assert list(folder.parent.iterdir()) == [folder]


OTHERS: dict[str, Callable[[], str]] = {
    "on another host": lambda: f"elsewhere {ended_process()} 1",
    "of a living process": lambda: f"{socket.gethostname()} {os.getppid()} {locks._start_of(os.getppid())}",
    "of another user": lambda: f"{socket.gethostname()} 1 {locks._start_of(1)}",
    "empty": lambda: "",
    "no lock": lambda: "a diary\n" * 1000,
    "no number": lambda: f"{socket.gethostname()} {10**30} 1",
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_lock_of_a_run_that_may_be_at_work_is_kept(folder: Path, lock: Path, other: str) -> None:
    text = OTHERS[other]()
    lock.write_text(text)
    with pytest.raises(PlanError, match=re.escape(str(lock))), lock_folder(folder):
        pass
    assert lock.read_text() == text and set(folder.parent.iterdir()) == {folder, lock}


def test_of_two_that_take_a_lock_over_one_gets_it(folder: Path, lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking at the lock of a killed run and removing it, another run has taken it over."""
    lock.write_text(f"{socket.gethostname()} {ended_process()} 1")
    theirs = f"{socket.gethostname()} {os.getppid()} 1"

    def is_gone(_: str) -> bool:
        lock.write_text(theirs)
        return True

    monkeypatch.setattr(locks, "_is_gone", is_gone)
    with pytest.raises(PlanError, match="another run"), lock_folder(folder):
        pass
    assert lock.read_text() == theirs and set(folder.parent.iterdir()) == {folder, lock}


def test_a_lock_that_somebody_else_has_taken_is_not_removed(folder: Path, lock: Path) -> None:
    with lock_folder(folder):
        lock.write_text("elsewhere 1 1")
    assert lock.read_text() == "elsewhere 1 1"


def test_a_full_disk_leaves_no_empty_lock(folder: Path, lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_up(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(locks, "write_all", fill_up)
    with pytest.raises(OSError, match=re.escape(str(lock))), lock_folder(folder):
        pass
    assert not lock.exists()
