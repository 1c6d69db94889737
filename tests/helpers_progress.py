"""A progress that calls a function with the bytes done."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from mergekit_lfm.machine.progress import Silence


class Counted(Silence):
    """Calls `advance` with each number of bytes done, in the work named `doing` alone if it is given.

    seen: the names of all work that was begun.
    """

    def __init__(self, advance: Callable[[int], None] = lambda _: None, doing: str = "") -> None:
        self.advance, self.doing, self.seen = advance, doing, list[str]()

    def by_bytes(self, nbytes: int, doing: str) -> AbstractContextManager[Callable[[int], None]]:  # noqa: ARG002
        """Count."""
        self.seen.append(doing)
        return nullcontext(self.advance if doing.startswith(self.doing) else lambda _: None)
