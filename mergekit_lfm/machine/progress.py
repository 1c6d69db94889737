"""How a workflow reports what it is doing, wherever that is shown."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Count = Callable[[int, int], None]  # called with how many are done, and of how many


class Progress(Protocol):
    """Shows what a workflow does. Each method but `notice` is a context around one part of the work."""

    def notice(self, line: str) -> None:
        """Show one line: a step that begins."""

    def by_bytes(self, nbytes: int, doing: str) -> AbstractContextManager[Callable[[int], None]]:
        """Work on so many bytes: the context is called with each number of bytes done, from any thread."""

    def by_count(self, unit: str, doing: str) -> AbstractContextManager[Count]:
        """Work on things counted in `unit`: the context is called with how many are done, and of how many."""

    def by_tick(self, unit: str, doing: str) -> AbstractContextManager[Callable[[int], None]]:
        """Work of unknown extent: the context is called with each number done."""


class Silence:
    """The progress that shows nothing."""

    def notice(self, line: str) -> None:
        """Show nothing."""

    def by_bytes(self, nbytes: int, doing: str) -> AbstractContextManager[Callable[[int], None]]:  # noqa: ARG002
        """Show nothing."""
        return nullcontext(lambda _: None)

    def by_count(self, unit: str, doing: str) -> AbstractContextManager[Count]:  # noqa: ARG002
        """Show nothing."""
        return nullcontext(lambda *_: None)

    def by_tick(self, unit: str, doing: str) -> AbstractContextManager[Callable[[int], None]]:  # noqa: ARG002
        """Show nothing."""
        return nullcontext(lambda _: None)


SILENCE = Silence()
