"""The executor on threads: every task is done once, an error ends it, and small results come together."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from mergekit_lfm.engine import threads


def numbers(_: object, task: int) -> Iterator[int]:
    """Two results of a task; the task -1 fails."""
    if task < 0:
        raise ValueError("a task that fails")
    yield from (2 * task, 2 * task + 1)


def worker() -> Any:
    """Stands in for one whose tasks are numbers."""
    stand_in = SimpleNamespace(stop=Event())
    stand_in.run = lambda task: numbers(stand_in, task)
    return stand_in


@pytest.mark.parametrize("count", [1, 3])
def test_small_results_are_handed_over_together(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """A change of threads for each of them would take longer than the merge of a small tensor."""
    batches: list[object] = []

    class Counted(queue.SimpleQueue[Any]):
        def put(self, item: object, block: bool = True, timeout: float | None = None) -> None:
            batches.append(item)
            super().put(item, block, timeout)

    monkeypatch.setattr(threads, "SimpleQueue", Counted)
    with threads.thread_pool(worker(), count) as executor:
        for _ in range(2):
            tasks: Any = iter(range(1000))
            found: list[Any] = list(executor(tasks))
            assert sorted(found) == list(range(2000))
    assert len(batches) < 400


@pytest.mark.parametrize("count", [1, 3])
def test_a_task_that_fails_ends_the_work_after_the_results_before_it(count: int) -> None:
    stand_in = worker()
    seen: list[Any] = []
    tasks: Any = iter([*range(10), -1, *range(10, 10**6)])
    with pytest.raises(ValueError, match="a task that fails"), threads.thread_pool(stand_in, count) as executor:
        for result in executor(tasks):
            seen.append(result)
    assert stand_in.stop.is_set() and next(tasks, None) is not None
    assert count > 1 or seen == list(range(20))
