"""When a long run saves its state: from time to time and on Ctrl-C, always between two batches."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EVERY_S = 30.0
SAVING_SHARE = 0.05  # saving takes at most this share of the time


class Pauses:
    """Says when to save: every so many seconds. Slow saves are further apart, so that they take at most a share."""

    def __init__(
        self,
        *,
        every_s: float = EVERY_S,
        saving_share: float = SAVING_SHARE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.every_s, self.saving_share, self._clock = every_s, saving_share, clock
        self._next = clock() + every_s

    @property
    def due(self) -> bool:
        """True if it is time to save."""
        return self._clock() >= self._next

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wrap a save: times it, and schedules the next one."""
        start = self._clock()
        yield
        now = self._clock()
        self._next = now + max(self.every_s, (now - start) / self.saving_share)


@contextmanager
def delay_interrupts() -> Iterator[Callable[[], bool]]:
    """Delay Ctrl-C: yields a function that returns True once it was pressed. Pressed again, it raises at once.

    Otherwise it could leave sums with half a batch added, which cannot be kept. Does nothing outside the main thread,
    or if someone else handles Ctrl-C.
    """
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if pressed:
            signal.default_int_handler(number, frame)
        pressed.append(number)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
