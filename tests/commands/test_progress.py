"""Progress in pipes and logs: a line a minute, by a clock that the test moves."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from mergekit_lfm.commands.show.progress import Pace, Terminal, duration


@dataclass
class Bench:
    """A clock that stands until it is moved, and the lines that a `Pace` writes."""

    now: float = 100.0
    lines: list[str] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def pace(self, doing: str, unit: str) -> Pace:
        return Pace(doing, unit, self.lines.append, self.clock)


def test_lines_come_once_a_minute_and_the_first_after_one() -> None:
    bench = Bench()
    pace = bench.pace("merging", "B")
    for second in range(0, 200, 10):
        bench.now = 100.0 + second
        pace.report(second * 10**6, 10**9)
    assert bench.lines == [
        "merging: 60.0 MB of 1.00 GB, 1.00 MB/s, 16 min left",
        "merging: 120 MB of 1.00 GB, 1.00 MB/s, 15 min left",
        "merging: 180 MB of 1.00 GB, 1.00 MB/s, 14 min left",
    ]


def test_an_interrupted_runs_share_is_not_in_the_rate() -> None:
    bench = Bench()
    pace = bench.pace("merging", "B")
    pace.report(9 * 10**8, 10**9)
    bench.now += 60
    pace.report(906 * 10**6, 10**9)
    assert bench.lines == ["merging: 906 MB of 1.00 GB, 100 KB/s, 16 min left"]


def test_a_first_report_after_a_long_time_has_no_rate() -> None:
    bench = Bench()
    pace = bench.pace("collecting", "examples")
    bench.now += 90
    pace.report(3, 1000)
    assert bench.lines == ["collecting: 3 of 1,000 examples"]


def test_work_of_unknown_extent_has_no_time_left() -> None:
    bench = Bench()
    pace = bench.pace("aligning", " sweeps")
    pace.report(1, None)
    bench.now += 64
    pace.report(33, None)
    assert bench.lines == ["aligning: 33 sweeps, 30 a minute"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (3600, "1 h 0 min"), (7505, "2 h 5 min")]
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def work(terminal: Terminal, bench: Bench) -> None:
    """A notice, and four steps of over a minute: by bytes, by count, with facts, and of unknown extent."""
    terminal.notice("downloading a")
    with terminal.by_bytes(400, "merging") as advance:
        advance(100)
        bench.now += 100
        advance(100)
    with terminal.by_count(" facts", "editing") as count:
        count(0, 4)
        bench.now += 61
        count(1, 4)
    with terminal.by_step(" steps", "tuning") as report:
        report(0, 4, "loss 3")
        bench.now += 61
        report(1, 4, "loss 2, 50 tokens/s")
    with terminal.by_tick("sweeps", "aligning") as tick:
        tick(0)
        bench.now += 61
        tick(5)


LINES = [
    "merging: 200 B of 400 B, 1 B/s, 3 min left",
    "editing: 1 of 4 facts, 0.984 a minute, 3 min left",
    "tuning: 1 of 4 steps, 0.984 a minute, 3 min left, loss 2, 50 tokens/s",
    "aligning: 5 sweeps, 4.92 a minute",
]


@pytest.mark.parametrize(
    ("hidden", "quiet", "shown"),
    [(False, False, ["downloading a", *LINES]), (True, False, LINES), (True, True, [])],
    ids=["plain", "json", "quiet"],
)
def test_a_pipe_and_a_log_have_the_same_lines(
    hidden: bool, quiet: bool, shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench()
    work(Terminal(hidden=hidden, quiet=quiet, log=bench.lines.append, clock=bench.clock), bench)
    assert capsys.readouterr().err.splitlines() == shown
    assert bench.lines == ["downloading a", *LINES]
