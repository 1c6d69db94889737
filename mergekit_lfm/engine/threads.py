"""Executors: the engine only needs an unordered map over tasks. This one uses threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from threading import Event
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Executor(Protocol):
    """An unordered map over tasks."""

    def __call__(self, run: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """The results in order of completion."""


class Stopped(Exception):
    """Another worker failed, or the user interrupted: this worker stops at its next block."""


@contextmanager
def thread_pool(count: int, stop: Event) -> Iterator[Executor]:
    """An executor on `count` threads. An exception inside sets `stop` and waits for the workers to notice."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

    def unordered(run: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        queue, running = iter(tasks), set[Future[R]]()
        while True:
            running |= {pool.submit(run, task) for task in islice(queue, 2 * count - len(running))}
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()

    try:
        yield unordered
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
