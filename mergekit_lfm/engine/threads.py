"""The executor on threads of this process, which share one worker."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from queue import SimpleQueue

import torch

from mergekit_lfm.engine.tasks import Executor, Result, Task
from mergekit_lfm.engine.worker import Worker


@contextmanager
def thread_pool(worker: Worker, count: int) -> Iterator[Executor]:
    """An executor on `count` threads. An exception inside stops the worker and waits for the threads to notice."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

    def unordered(tasks: Iterable[Task]) -> Iterator[Result]:
        results = SimpleQueue[Result | BaseException | None]()  # None at the end of a task

        def work(task: Task) -> None:
            try:
                for result in worker.run(task):
                    results.put(result)
                results.put(None)
            except BaseException as error:
                results.put(error)

        rest, running = iter(tasks), 0
        while True:
            for task in islice(rest, 2 * count - running):
                pool.submit(work, task)
                running += 1
            if not running:
                return
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            if result is None:
                running -= 1
            else:
                yield result

    try:
        yield unordered
    except BaseException:
        worker.stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
