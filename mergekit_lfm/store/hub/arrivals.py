"""Count the bytes that arrive in a folder: the client of the Hub tells its progress to its own bars alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event


@contextmanager
def count_arrivals(folder: Path, advance: Callable[[int], None], every_s: float = 1.0) -> Iterator[None]:
    """Within it, call `advance` from a thread with each number of bytes that the files grow by, and once at its end."""
    before, over = _allocated(folder), Event()

    def look() -> None:
        nonlocal before
        now = _allocated(folder)
        advance(max(0, now - before))
        before = max(before, now)

    def watch() -> None:
        while not over.wait(every_s):
            look()

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield
        finally:
            over.set()
    watching.result()
    look()


def _allocated(folder: Path) -> int:
    """Bytes on the disk that the folder's files take; unfinished ones may have their full size from the start."""
    total = 0
    for file in folder.iterdir() if folder.is_dir() else ():
        with suppress(FileNotFoundError):  # it was complete meanwhile, and has another name
            total += file.stat().st_blocks * 512
    return total
