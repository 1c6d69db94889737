"""The request that a job's file answers, as `output/request.py` has it for folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mergekit_lfm.errors import PlanError
from mergekit_lfm.output.request import Request
from mergekit_lfm.store.places import beside, check_file


def lock_beside(out: Path) -> Path:
    """The lock of a file that has no room for one in it: OUT.lock.json."""
    return beside(out, ".lock.json")


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
