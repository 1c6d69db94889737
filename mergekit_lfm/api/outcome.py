"""The outcome that every workflow returns, and the way of its findings to a Python caller."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from mergekit_lfm.machine.text import printable_line

T = TypeVar("T")


class Finding(UserWarning):
    """Something about the inputs or the machine that a user should know, although the work was done."""


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """The result of a workflow. An outcome with a path can be passed wherever a path is expected.

    path: the folder or file that holds the result, None if nothing was written. result: what the workflow itself
    returns. digest: of the plan or artifact at `path`, None where it has none. already_there: an earlier run had
    written it. warnings: its findings, one line each; they are also given to `warnings.warn` as `Finding`.
    """

    path: Path | None
    result: T
    digest: str | None = None
    already_there: bool = False
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    def __fspath__(self) -> str:
        if self.path is None:
            raise TypeError("this outcome has no path: nothing was written")
        return os.fspath(self.path)


def warn_of(findings: Iterable[str], depth: int = 1) -> tuple[str, ...]:
    """Give each finding to `warnings.warn`, in the name of the workflow's caller, so many calls up; return all."""
    lines = tuple(map(printable_line, findings))
    for line in lines:
        warnings.warn(line, Finding, stacklevel=2 + depth)
    return lines
