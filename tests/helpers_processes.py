"""An executor on processes of their own, which tests kill: the same demands as a merge on several machines."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from mergekit_lfm.engine.sites import Engine, Site
from mergekit_lfm.engine.tasks import Executor, Result, Task
from mergekit_lfm.engine.worker import Pool, Worker


def on(pool: Pool) -> Engine:
    """An engine of a pool, and of all else that this machine has."""
    return lambda _: nullcontext(Site(pool))


def serve(pipe: Connection, pickled: bytes) -> None:
    """Do the tasks that come through the pipe."""
    torch.set_num_threads(1)
    worker: Worker = pickle.loads(pickled)
    with worker:
        while (task := pipe.recv()) is not None:
            try:
                for result in worker.run(task):
                    pipe.send(result)
                pipe.send(None)
            except Exception as error:  # for the driver, whatever it is
                pipe.send(error)


@dataclass(eq=False)
class Member:
    """A process of the pool, and the task that it does."""

    process: SpawnProcess
    pipe: Connection
    task: Task | None = None


@dataclass
class Processes:
    """A pool of spawned processes. kill(number): true to kill a process that is at work, after so many results.

    sizes: bytes of each task as it was sent. lost: the number of processes that were killed and replaced.
    """

    kill: Callable[[int], bool] = lambda _: False
    sizes: list[int] = field(default_factory=list)
    lost: int = 0

    @contextmanager
    def __call__(self, worker: Worker, count: int) -> Iterator[Executor]:
        """The executor; it ends the processes when it is left."""
        pickled = pickle.dumps(worker)
        members = [_start(pickled) for _ in range(count)]
        number = 0

        def unordered(tasks: Iterable[Task]) -> Iterator[Result]:
            nonlocal number
            rest = deque(tasks)
            while rest or any(member.task for member in members):
                for member in members:
                    if rest and member.task is None:
                        member.task = rest.popleft()
                        self.sizes.append(len(pickle.dumps(member.task)))
                        member.pipe.send(member.task)
                for pipe in wait([member.pipe for member in members if member.task]):
                    member = next(member for member in members if member.pipe is pipe)
                    try:
                        result = member.pipe.recv()
                    except (EOFError, OSError, pickle.UnpicklingError):
                        assert member.task is not None
                        rest.appendleft(member.task)
                        members[members.index(member)] = _start(pickled)
                        self.lost += 1
                        continue
                    if isinstance(result, Exception):
                        raise result
                    if result is None:
                        member.task = None
                        continue
                    yield result
                    number += 1
                    if self.kill(number):
                        busy = next((m for m in members if m.task), None)
                        if busy is not None:
                            busy.process.kill()

        try:
            yield unordered
        finally:
            for member in members:
                member.process.kill()
                member.process.join()


def _start(pickled: bytes) -> Member:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, pickled), daemon=True)
    process.start()
    theirs.close()
    return Member(process, ours)
