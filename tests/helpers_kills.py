"""Kill commands at random moments of the clock, and let each do its work after all."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Mapping
from functools import cache

from helpers_jobs import COMMANDS, Bench, Files

MOMENTS = ("before", "while", "after")  # it wrote; a push leaves nothing here, and so is killed before or after


def kill_at_random(bench: Bench, count: int, seed: int) -> Counter[tuple[str, str]]:
    """Kill the commands by turns, `count` times in all, each run after a part of the time that it takes.

    Asserts that every output is complete or not there, that the inputs are as they were, and that the same command then
    completes the outputs, to the bytes of an uninterrupted run. Returns the number of kills by command and moment, and
    under "too late" that of runs that had ended.
    """
    draw = random.Random(seed)

    @cache
    def whole(name: str) -> tuple[float, dict[str, Files]]:
        """The seconds that an uninterrupted run takes, and its outputs."""
        expected = bench.whole(name)[1]
        started = time.monotonic()
        bench.run(name)
        return time.monotonic() - started, expected

    outcomes = Counter[tuple[str, str]]()
    names = list(COMMANDS)
    while (kills := sum(outcomes[name, moment] for name in names for moment in MOMENTS)) < count:
        name = names[kills % len(names)]
        seconds, expected = whole(name)
        bench.start_over()
        ran = bench.run(name, kill_after_s=draw.uniform(1e-3, seconds))
        assert ran.code in (0, -signal.SIGKILL), f"{name}: {ran.err}"
        outcomes[name, "too late" if ran.code == 0 else _moment(bench, expected)] += 1
        bench.check_places(expected)
        bench.finish(name, expected)
    return outcomes


def _moment(bench: Bench, expected: Mapping[str, Files]) -> str:
    """The moment of a kill, by what it has left."""
    made = bench.outputs()
    if not made:
        return "before"
    return "after" if all(made.get(place) == files for place, files in expected.items()) else "while"
