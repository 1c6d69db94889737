"""The executor on threads of this process, which share one worker."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Lock

import torch

from mergekit_lfm.engine.tasks import Executor, Result, Task
from mergekit_lfm.engine.worker import Worker

HANDED_OVER_S = 0.05  # a change of threads for each result costs more than merging a small tensor


@contextmanager
def thread_pool(worker: Worker, count: int) -> Iterator[Executor]:
    """An executor on `count` threads. An exception inside stops the worker and waits for the threads to notice."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

    def unordered(tasks: Iterable[Task]) -> Iterator[Result]:
        results = SimpleQueue[list[Result] | BaseException | None]()  # None at the end of a thread
        rest, turn = iter(tasks), Lock()

        def take() -> Task | None:
            with turn:
                return None if worker.stop.is_set() else next(rest, None)

        def work() -> None:
            done, since = list[Result](), time.monotonic()
            end: BaseException | None = None
            try:
                while (task := take()) is not None:
                    for result in worker.run(task):
                        done.append(result)
                        if time.monotonic() - since > HANDED_OVER_S:
                            results.put(done)
                            done, since = [], time.monotonic()
            except BaseException as error:
                end = error
            results.put(done)
            results.put(end)

        for _ in range(count):
            pool.submit(work)
        for _ in range(count):
            while (batch := results.get()) is not None:
                if isinstance(batch, BaseException):
                    raise batch
                yield from batch

    try:
        yield unordered
    except BaseException:
        worker.stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
