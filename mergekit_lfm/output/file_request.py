"""The request that a job's file answers, as `output/request.py` has it for folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.output.request import Request
from mergekit_lfm.store.files import read_json
from mergekit_lfm.store.places import beside, check_file

IMAGES, PICTURE = ".npz", ".png"  # ends of the names of images, and of the picture that shows some of them


def lock_beside(out: Path) -> Path:
    """The lock of a file that has no room for one in it: OUT.lock.json."""
    return beside(out, ".lock.json")


def files_beside(out: Path) -> list[Path]:
    """The files that come with a file: its lock, and the picture of images."""
    return [lock_beside(out), *([out.with_suffix(PICTURE)] if out.suffix == IMAGES else [])]


def read_lock_beside(out: Path, job: str) -> dict[str, Any]:
    """The lock beside a file. Raises FormatError for one of another job, OSError without one."""
    place = lock_beside(out)
    lock = read_json(place)
    if not (isinstance(lock, dict) and lock.get("job") == job and {"request", "content", "result"} <= lock.keys()):
        raise FormatError(f"{place} is not the lock of a file of `{job}`; expected one that `{job}` wrote")
    return lock


def check_lock_beside(out: Path, job: str) -> None:
    """Raise PlanError if another file is in the place of the lock."""
    try:
        read_lock_beside(out, job)
    except FileNotFoundError:
        return
    except (FormatError, OSError):
        raise PlanError(f"{lock_beside(out)} is in the way of the lock of {out.name}; move it away") from None


@dataclass(frozen=True)
class FileRequest:
    """The request that a file answers. files: those that are read besides the models.

    kind: of the file, in words, such as "a patch". answers: whether a file of this kind is the result of the request;
    raises FormatError for another kind.
    """

    request: Request
    files: tuple[Path, ...]
    kind: str
    answers: Callable[[Path], bool]

    @property
    def paths(self) -> dict[str, Path]:
        """The folders and files that are read, by their names in messages."""
        return {**self.request.paths, **{str(path): path for path in self.files}}

    def is_answered(self, out: Path, *, overwrite: bool) -> bool:
        """True if OUT is the result of this request; False if it may be written there, else PlanError."""
        if out.is_file() and not overwrite and self.is_of(out):
            return True
        check_file(out, self.paths.values(), overwrite=overwrite)
        if out.is_file() and not self.is_kind(out):
            raise PlanError(f"{out} exists and is not {self.kind}, which alone is overwritten; choose another output")
        return False

    def is_of(self, out: Path) -> bool:
        """True if a file is the result of this request."""
        try:
            return self.answers(out)
        except (ValueError, OSError):
            return False

    def is_kind(self, out: Path) -> bool:
        """True if a file is of the kind of the result."""
        try:
            self.answers(out)
        except (ValueError, OSError):
            return False
        return True
