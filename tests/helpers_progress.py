"""A progress that calls a function with the bytes done."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from mergekit_lfm.machine.progress import Silence


class Counted(Silence):
    """Calls `advance` with each number of bytes done. seen: the names of all work that was begun."""

    def __init__(self, advance: Callable[[int], None] = lambda _: None) -> None:
        self.advance, self.seen = advance, list[str]()

    def by_bytes(self, nbytes: int, doing: str, *, bar: bool = True) -> AbstractContextManager[Callable[[int], None]]:  # noqa: ARG002
        """Count."""
        self.seen.append(doing)
        return nullcontext(self.advance)
