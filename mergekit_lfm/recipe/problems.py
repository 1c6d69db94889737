"""Problems of a recipe: where, and what is wrong there. Checks return them, so that a user sees all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from mergekit_lfm.errors import PlanError

T = TypeVar("T")


class Problem(NamedTuple):
    """One line of a message: a place in the recipe and what is wrong there. Lines that go on have no place."""

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}" if self.place else self.text


class InnerError(ValueError):
    """A problem inside of the value that a caller has read: `place` goes on from the caller's, as in `[1].value`."""

    def __init__(self, place: str, text: str) -> None:
        super().__init__(f"{place}: {text}")
        self.place, self.text = place, text


def attempt(read: Callable[[], T], place: str) -> tuple[T | None, list[Problem]]:
    """The result of `read`; or None, and the problem in the ValueError that it raises."""
    try:
        return read(), []
    except InnerError as wrong:
        return None, [Problem(place + wrong.place, wrong.text)]
    except ValueError as wrong:
        first, *rest = str(wrong).split("\n")
        return None, [Problem(place, first), *(Problem("", line) for line in rest)]


def refuse(problems: Sequence[Problem]) -> None:
    """Raise PlanError with a line for each problem, if there are any."""
    if problems:
        raise PlanError("\n".join(map(str, problems)))
