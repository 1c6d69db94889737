"""Tables, counts and progress bars on a terminal."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

from mergekit_lfm.machine.text import printable_line

if TYPE_CHECKING:
    from tqdm import tqdm


def table(rows: Sequence[Sequence[str]], right: str = "") -> str:
    """The rows in aligned columns, the first row as headings. `right`: headings of the columns aligned to the right."""
    rows = [[*map(printable_line, row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.rjust if heading in right.split() else str.ljust for heading in rows[0]]
    lines = ("  ".join(side(cell, w) for side, cell, w in zip(sides, row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def count_noun(n: int, noun: str) -> str:
    """ "1 tensor", "2 tensors"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


@contextmanager
def progress_bar(nbytes: int, doing: str, hidden: bool) -> Iterator[Callable[[int], None]]:
    """A bar of `nbytes` with rate and time left on standard error, if that is a terminal and not `hidden`.

    Call it with numbers of bytes done, from any thread. It appears at the first call, so that earlier output does not
    mix with it, and disappears at the end.
    """
    lock, bars = Lock(), list["tqdm[Any]"]()

    def advance(done: int) -> None:
        with lock:
            if not bars:
                bars.append(_bar(nbytes, doing, "B", hidden))
            bars[0].update(done)

    try:
        yield advance
    finally:
        for bar in bars:
            bar.close()


@contextmanager
def counter(unit: str, doing: str, hidden: bool) -> Iterator[Callable[[int, int], None]]:
    """The same bar, counting in `unit`. Call it with the number done so far and the total."""
    with _bar(None, doing, unit, hidden) as bar:

        def report(done: int, total: int) -> None:
            if bar.total is None:  # an interrupted run's share must not count in this run's rate
                bar.total, bar.initial, bar.n = total, done, done
                bar.refresh()
            bar.update(done - bar.n)

        yield report


@contextmanager
def ticker(unit: str, doing: str, hidden: bool) -> Iterator[Callable[[int], None]]:
    """A count in `unit` without a known total."""
    with _bar(None, doing, unit, hidden) as bar:

        def advance(done: int) -> None:
            bar.update(done)

        yield advance


class Terminal:
    """Progress on standard error: lines, and bars where that is a terminal; nothing where `hidden`."""

    def __init__(self, *, hidden: bool) -> None:
        self.hidden = hidden

    def notice(self, line: str) -> None:
        """Print the line."""
        if not self.hidden:
            print(printable_line(line), file=sys.stderr)

    def by_bytes(self, nbytes: int, doing: str) -> AbstractContextManager[Callable[[int], None]]:
        """A bar with rate and time left."""
        return progress_bar(nbytes, doing, self.hidden)

    def by_count(self, unit: str, doing: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """A bar of what is counted in `unit`."""
        return counter(unit, doing, self.hidden)

    def by_tick(self, unit: str, doing: str) -> AbstractContextManager[Callable[[int], None]]:
        """A count."""
        return ticker(unit, doing, self.hidden)


def _bar(total: int | None, doing: str, unit: str, hidden: bool) -> tqdm[Any]:
    from tqdm import TqdmMonitorWarning, tqdm

    unseen = True if hidden else None  # None: unless the stream is a terminal
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmMonitorWarning)  # it has no thread to redraw a bar that stands still
        return tqdm(
            total=total,
            desc=printable_line(doing),
            unit=unit,
            unit_scale=True,
            leave=False,
            disable=unseen,
            file=sys.stderr,
        )
