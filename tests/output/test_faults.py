"""Every call of a command may fail: nothing half-written is left, one message says why, and the command goes on.

A merge, statistics, an edit, a patch and a push run with a fault at each of their calls, among them those that only
read. Faults that a program can do without, such as short reads or a file system without locks, change nothing at all.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from errno import EDQUOT, EINTR, EIO, EMFILE, ENOLCK, ENOSPC, EOPNOTSUPP, EPERM, EROFS, ESTALE, EXDEV, errorcode
from typing import Any

import pytest
from helpers_faults import Call, snapshot
from helpers_jobs import Bench, Files, open_bench

COMMANDS = ["merge linear", "stats gram", "edit", "patch apply", "push"]
STEP = 1 if "LONG_TESTS" in os.environ else 3  # all calls take minutes
DATA, NAMING, READING = (ENOSPC, EIO, EDQUOT, ESTALE), (EROFS, EIO, ENOSPC, ESTALE), (EIO, ESTALE)
ERRORS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("write", "pwrite", "fsync", "fdatasync", "fallocate", "ftruncate"), DATA),
    **dict.fromkeys(("mkdir", "rename", "unlink", "rmdir"), NAMING),
    **dict.fromkeys(("read", "preadv", "flock", "copy_file_range"), READING),
    "open": (*NAMING, EMFILE),
}
HARMLESS: dict[str, dict[str, Any]] = {
    "short reads and writes": {"short": True, "reads": True},
    "signals all the time": {"alarms": True},
    "no locks": {"fail": "flock", "error": ENOLCK},
    "no copies, EPERM": {"fail": "copy_file_range", "error": EPERM},
    "no copies, EXDEV": {"fail": "copy_file_range", "error": EXDEV},
    "no copies, EOPNOTSUPP": {"fail": "copy_file_range", "error": EOPNOTSUPP},
    "a copy that stops": {"fail": "copy_file_range", "error": EIO, "nth": 2},
    "an interrupted reservation": {"fail": "fallocate", "error": EINTR, "times": 3},
    "no reservation": {"fail": "fallocate", "error": EOPNOTSUPP},
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with open_bench(tmp_path_factory.mktemp("bench")) as bench:
        yield bench


Fault = tuple[str, int, Call]  # the kind of the call that fails, its number of that kind, the call


def one_of_each(faults: list[Fault]) -> list[Fault]:
    """The middle one of each kind."""
    kinds = [[fault for fault in faults if fault[0] == kind] for kind in dict.fromkeys(fault[0] for fault in faults)]
    return [same[len(same) // 2] for same in kinds]


def calls_within(bench: Bench, calls: tuple[Call, ...]) -> list[Fault]:
    """The calls on files of the bench, each with its number among those of its kind."""
    counts, found = Counter[str](), []
    for call in calls:
        if call.target.startswith(str(bench.folder)):
            counts[call.name] += 1
            found.append((call.name, counts[call.name], call))
    return found


def state_of(bench: Bench) -> object:
    """All files but the inputs, to know whether the command has gone on from this state before."""
    files = snapshot(bench.folder)
    return tuple((re.sub("[0-9a-f]{16}", "", path), files[path]) for path in files if not path.startswith("in"))


def fail_calls(bench: Bench, name: str, choose: Callable[[list[Fault]], list[Fault]] = list) -> int:
    """Run the command with a fault at each of its calls, or those chosen, and then again; returns the number of faults.

    An error lasts, or comes once, by turns. A state of the disk from which the command has gone on once is enough.
    """
    whole, expected = bench.whole(name)
    seen: set[object] = {state_of(bench)}
    file_and_advice = rf"error: ({bench.folder}|in/|out)\S*: .*; \w+"
    faults = choose(calls_within(bench, whole.calls))
    for number, (kind, nth, call) in enumerate(faults):
        error = ERRORS[kind][number % len(ERRORS[kind])]
        fault = {"fail": kind, "nth": nth, "times": number % 2, "error": error, "where": str(bench.folder)}
        ran = bench.run(name, reads=True, **fault)
        about = f"{kind} number {nth}, {call.target}, {errorcode[error]}: {ran.code}, {ran.err}"
        bench.check_places(expected)
        if ran.code == 0:  # what failed was not needed, such as a cache
            assert bench.outputs() == expected, about
        else:
            assert (ran.code, ran.out, ran.err.count("error: ")) == (2, "", 1), about
            assert "Traceback" not in ran.err and os.strerror(error) in ran.err, about
            assert re.search(file_and_advice, ran.err), about
            if (state := state_of(bench)) not in seen:
                seen.add(state)
                bench.finish(name, expected)
        bench.start_over()
    return len(faults)


def check_harmless(bench: Bench, name: str, expected: dict[str, Files], fault: dict[str, Any]) -> None:
    """The command with this fault makes what it makes without."""
    ran = bench.run(name, where=str(bench.folder), **fault)
    assert ran.code == 0, ran.err
    bench.check_places(expected)
    assert bench.outputs() == expected
    bench.start_over()


def test_some_calls_fail(bench: Bench) -> None:
    """The next test has most of them, with LONG_TESTS=1 all."""
    assert fail_calls(bench, "merge linear", one_of_each) > 10
    for name in ("stats gram", "patch apply", "push"):
        assert fail_calls(bench, name, lambda faults: faults[::37]) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_call_fails(bench: Bench, name: str) -> None:
    assert fail_calls(bench, name, lambda faults: [*one_of_each(faults), *faults[::STEP]]) > 90 // STEP


def test_a_failing_call_with_a_substitute_changes_nothing(bench: Bench) -> None:
    name = "patch apply"  # which copies, reserves, locks, reads and writes
    expected = bench.whole(name)[1]
    for fault in HARMLESS.values():
        check_harmless(bench, name, expected, fault)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COMMANDS, "merge regmean", "edit --save", "align --save", "repair"])
def test_a_failing_call_with_a_substitute_changes_nothing_in_any_command(bench: Bench, name: str) -> None:
    expected = bench.whole(name)[1]
    for fault in ("short reads and writes", "signals all the time", "no locks"):
        check_harmless(bench, name, expected, HARMLESS[fault])


@pytest.mark.slow
def test_killed_on_a_file_system_without_locks(bench: Bench) -> None:
    """The lock file of a run that was killed does not stop the next one."""
    _, expected = bench.whole("merge linear")
    lock = bench.folder / "out.partial.lock"
    for moment in range(1, 150, 11):
        bench.run("merge linear", fail="flock", error=ENOLCK, kill_at=moment)
        bench.check_places(expected)
        if lock.exists() and not lock.read_text():  # killed between two calls: only the user can know
            lock.unlink()
        ran = bench.run("merge linear", fail="flock", error=ENOLCK)
        assert ran.code == 0, ran.err
        assert bench.outputs() == expected and not lock.exists()
        bench.start_over()
