"""The protocol by which a workflow reports its progress, on any display."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Count = Callable[[int, int], None]  # called with (number done, number in all)
Report = Callable[[int, int, str], None]  # and with other facts, in words


class Progress(Protocol):
    """Shows a workflow's progress. Each method except `notice` is a context around one step of the work."""

    def notice(self, line: str) -> None:
        """Show one line: a step that begins."""

    def by_bytes(self, nbytes: int, doing: str, *, bar: bool = True) -> AbstractContextManager[Callable[[int], None]]:
        """Work on `nbytes` bytes: call the context's value with each number of bytes done, from any thread.

        bar: False for work that shows a bar of its own.
        """

    def by_count(self, unit: str, doing: str) -> AbstractContextManager[Count]:
        """Work counted in `unit`: call the context's value with (number done, number in all)."""

    def by_step(self, unit: str, doing: str) -> AbstractContextManager[Report]:
        """Work counted in `unit`, with facts to show beside: call with (number done, number in all, the facts)."""

    def by_tick(self, unit: str, doing: str) -> AbstractContextManager[Callable[[int], None]]:
        """Work of unknown extent: call the context's value with each number done."""


class Silence:
    """The progress that shows nothing."""

    def notice(self, line: str) -> None:
        """Show nothing."""

    def by_bytes(
        self,
        nbytes: int,  # noqa: ARG002
        doing: str,  # noqa: ARG002
        *,
        bar: bool = True,  # noqa: ARG002
    ) -> AbstractContextManager[Callable[[int], None]]:
        """Show nothing."""
        return nullcontext(lambda _: None)

    def by_count(self, unit: str, doing: str) -> AbstractContextManager[Count]:  # noqa: ARG002
        """Show nothing."""
        return nullcontext(lambda *_: None)

    def by_step(self, unit: str, doing: str) -> AbstractContextManager[Report]:  # noqa: ARG002
        """Show nothing."""
        return nullcontext(lambda *_: None)

    def by_tick(self, unit: str, doing: str) -> AbstractContextManager[Callable[[int], None]]:  # noqa: ARG002
        """Show nothing."""
        return nullcontext(lambda _: None)


SILENCE = Silence()
