"""When a long run keeps what it has: from time to time, and when it is interrupted, between two batches."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EVERY_S = 30.0
SHARE = 0.05  # of the time, at most, that goes into keeping


class Pauses:
    """Whether it is time to keep what there is. Pauses are longer apart where keeping takes long."""

    def __init__(self) -> None:
        self._next = time.monotonic() + EVERY_S

    @property
    def due(self) -> bool:
        """Whether the time has come."""
        return time.monotonic() >= self._next

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Around what is done in a pause."""
        start = time.monotonic()
        yield
        now = time.monotonic()
        self._next = now + max(EVERY_S, (now - start) / SHARE)


@contextmanager
def interrupts_noted() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits until it is asked for: yields whether it was pressed. Pressed again, it raises at once.

    Sums that a batch was added to by half could not be kept. Where this is not the main thread, or Ctrl-C is handled
    by someone else, nothing changes.
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
