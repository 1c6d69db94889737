"""Problems of a recipe: where, and what is wrong there. Checks return them, so that a user sees all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from mergekit_lfm.errors import PlanError, Refusal

T = TypeVar("T")


class Problem(NamedTuple):
    """One line of a message: a place in the recipe and what is wrong there. Lines that go on have no place.

    parts: those of the text that are known by name, as in a `Refusal`. unknown: the place of a key that nobody reads,
    without which the problem is gone.
    """

    place: str
    text: str
    parts: Mapping[str, str] = MappingProxyType({})
    unknown: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.text}" if self.place else self.text


class InnerError(Refusal):
    """A problem inside of the value that a caller has read: `place` goes on from the caller's, as in `[1].value`."""

    def __init__(self, at: str, sentence: str, **words: object) -> None:
        super().__init__("{at}: " + sentence, at=at, **words)
        self.place, self.text = at, sentence.format(**words)


class Problems(PlanError):
    """All problems that a check has found, a line for each."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("{lines}", lines="\n".join(map(str, problems)), **parts_of(problems))
        self.problems = tuple(problems)


class UnknownKey(InnerError):
    """A key that nobody reads, inside of the value that a caller has read: `key` goes on from the caller's place."""

    def __init__(self, at: str, key: object, sentence: str, **words: object) -> None:
        super().__init__(at, sentence, **words)
        self.key = f"{at}.{key}"


def problem_at(place: str, sentence: str, **words: object) -> Problem:
    """The problem at a place, from the same sentence and words as a `Refusal` is made of."""
    refusal = Refusal(sentence, **words)
    return Problem(place, str(refusal), refusal.parts)


def attempt(read: Callable[[], T], place: str) -> tuple[T | None, list[Problem]]:
    """The result of `read`; or None, and the problem in the ValueError that it raises."""
    try:
        return read(), []
    except InnerError as wrong:
        unknown = place + wrong.key if isinstance(wrong, UnknownKey) else ""
        return None, [Problem(place + wrong.place, wrong.text, wrong.parts, unknown)]
    except ValueError as wrong:
        first, *rest = str(wrong).split("\n")
        parts = wrong.parts if isinstance(wrong, Refusal) else {}
        return None, [Problem(place, first, parts), *(Problem("", line) for line in rest)]


def parts_of(problems: Sequence[Problem]) -> dict[str, str]:
    """The parts of a problem that stands alone, its place among them; {} for several."""
    if len(problems) != 1:
        return {}
    (alone,) = problems
    return {**alone.parts, **({"place": alone.place} if alone.place else {})}


def refuse(problems: Sequence[Problem]) -> None:
    """Raise PlanError with a line for each problem, if there are any."""
    if problems:
        raise Problems(problems)
