"""Progress on standard error: bars on a terminal, in a pipe a line a minute; and the same lines in a log."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

from mergekit_lfm.commands.show.terminal import tell
from mergekit_lfm.machine.sizes import format_size
from mergekit_lfm.machine.text import printable_line

if TYPE_CHECKING:
    from tqdm import tqdm

MINUTE = 60.0  # seconds between two lines
BYTES = "B"  # the unit of work that is measured in bytes

Clock = Callable[[], float]  # seconds since any moment
Tell = Callable[[str], None]  # takes one line


class Pace:
    """Lines about a step of the work, to `tell`: at most one a minute, the first after a minute.

    The rate leaves out the work that the first report brings: it may be of an earlier, interrupted run.
    """

    def __init__(self, doing: str, unit: str, tell: Tell, clock: Clock) -> None:
        self.doing, self.unit, self.tell, self.clock = doing, unit.strip(), tell, clock
        self.last = clock()
        self.first: tuple[float, int] | None = None

    def report(self, done: int, total: int | None, facts: str = "") -> None:
        """Say how much is done so far, of how much in all if that is known, and facts, if a minute has passed."""
        now = self.clock()
        self.first = self.first or (now, done)
        if now - self.last >= MINUTE:
            self.last = now
            self.tell(f"{self.doing}: " + ", ".join([*self._parts(now, done, total), *([facts] if facts else [])]))

    def _parts(self, now: float, done: int, total: int | None) -> Iterator[str]:
        in_bytes = self.unit == BYTES
        amounts = [format_size(n) if in_bytes else f"{n:,}" for n in (done, total) if n is not None]
        yield " of ".join(amounts) + ("" if in_bytes else f" {self.unit}")
        began, before = self.first or (now, done)
        if now > began and done > before:
            rate = (done - before) / (now - began)
            yield f"{format_size(rate)}/s" if in_bytes else f"{rate * MINUTE:.3g} a minute"
            if total is not None:
                yield f"{duration((total - done) / rate)} left"


def duration(seconds: float) -> str:
    """The time in words: "40 s", "3 min", "2 h 5 min"."""
    if seconds < MINUTE:
        return f"{seconds:.0f} s"
    minutes = round(seconds / MINUTE)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


class Terminal:
    """A workflow's progress, as `machine/progress.py` declares it.

    hidden: no notices and no bars. quiet: no lines either. log: takes notices and lines in any case.
    """

    def __init__(self, *, hidden: bool, quiet: bool = False, log: Tell | None = None, clock: Clock = time.monotonic):
        self.hidden, self.quiet, self.log, self.clock = hidden, quiet, log, clock

    def notice(self, line: str) -> None:
        """Print the line."""
        if not self.hidden:
            tell(printable_line(line))
        if self.log is not None:
            self.log(line)

    @contextmanager
    def by_bytes(self, nbytes: int, doing: str, *, bar: bool = True) -> Iterator[Callable[[int], None]]:
        """A bar with rate and time left. It appears at the first call, so that earlier output does not mix with it."""
        lock, pace, bars, done = Lock(), self._pace(doing, BYTES), list["tqdm[Any]"](), 0

        def advance(more: int) -> None:
            nonlocal done
            with lock:
                if bar and not bars:
                    bars.append(self._bar(nbytes, doing, BYTES))
                for shown in bars:
                    shown.update(more)
                done += more
                pace.report(done, nbytes)

        try:
            yield advance
        finally:
            for shown in bars:
                shown.close()

    @contextmanager
    def by_count(self, unit: str, doing: str) -> Iterator[Callable[[int, int], None]]:
        """A bar of what is counted in `unit`."""
        with self.by_step(unit, doing) as report:
            yield lambda done, total: report(done, total, "")

    @contextmanager
    def by_step(self, unit: str, doing: str) -> Iterator[Callable[[int, int, str], None]]:
        """A bar of what is counted in `unit`, with facts after it."""
        pace = self._pace(doing, unit)
        with self._bar(None, doing, unit) as bar:

            def report(done: int, total: int, facts: str) -> None:
                if bar.total is None:  # an interrupted run's share must not count in this run's rate
                    bar.total, bar.initial, bar.n = total, done, done
                    bar.refresh()
                bar.set_postfix_str(facts, refresh=False)
                bar.update(done - bar.n)
                pace.report(done, total, facts)

            yield report

    @contextmanager
    def by_tick(self, unit: str, doing: str) -> Iterator[Callable[[int], None]]:
        """A count in `unit` without a known total."""
        pace, done = self._pace(doing, unit), 0
        with self._bar(None, doing, unit) as bar:

            def advance(more: int) -> None:
                nonlocal done
                bar.update(more)
                done += more
                pace.report(done, None)

            yield advance

    def _pace(self, doing: str, unit: str) -> Pace:
        return Pace(doing, unit, self._tell_line, self.clock)

    def _tell_line(self, line: str) -> None:
        if not self.quiet and not sys.stderr.isatty():
            tell(printable_line(line))
        if self.log is not None:
            self.log(line)

    def _bar(self, total: int | None, doing: str, unit: str) -> tqdm[Any]:
        from tqdm import TqdmMonitorWarning, tqdm

        unseen = True if self.hidden else None  # None: unless the stream is a terminal
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
