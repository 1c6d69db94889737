"""The executor on a Ray cluster: tasks of some hundred bytes go to its nodes, and receipts come back.

The nodes share a file system. Their processes read inputs from it and write byte ranges of the output to it; no tensor
passes through Ray. A task that is done twice writes the same bytes: so Ray does those of a lost process or node again,
and one that takes far longer than the others is also given to another process, whichever ends first.
"""

from __future__ import annotations

import socket
import statistics
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mergekit_lfm.engine.nodes import enter, refuse_unlike, refuse_versions
from mergekit_lfm.engine.ray_cluster import Lost, connected, import_ray, look_at, result_of, versions_here
from mergekit_lfm.engine.sites import Engine, Site
from mergekit_lfm.engine.tasks import Executor, Result, Task
from mergekit_lfm.engine.worker import Worker
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.accelerators import HOST
from mergekit_lfm.machine.sizes import format_size
from mergekit_lfm.plan.plan import Plan

RETRIES = 8  # of a task whose process or node is lost
SHARES = 32  # parts of the work of a process: calls of Ray take some milliseconds, so small tasks go together
MOST = 16  # tasks of a call
LOOK_S = 1.0  # between looks for tasks that take long
SLOW, SLOW_S = 3.0, 20.0  # a task is given to another process after so many times the median, and so many seconds

_kept = dict[str, Worker]()  # in a process of Ray: its worker, by the token of a merge


def ray_engine(address: str | None) -> Engine:
    """The engine on the cluster at an address; None: on one of this machine, for the run alone."""
    return partial(_site, address)


@contextmanager
def _site(address: str | None, plan: Plan) -> Iterator[Site]:
    ray = import_ray()
    with connected(ray, address):
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        looks = look_at(ray, plan, nodes)
        refuse_unlike(looks, plan)
        cores = int(min(node["Resources"]["CPU"] for node in nodes))
        memory = min(int(node["Resources"]["memory"]) for node in nodes)
        pool = _Pool(ray, cores, memory, sync=address is not None)
        yield Site(pool, min([memory, *(look.memory for look in looks)]), cores)


def _do(given: _Given, tasks: Sequence[Task], *, sync: bool) -> list[Result]:
    """Runs in a process of Ray: do tasks of a merge, by a worker that is kept for the next call.

    sync: the data reach the disk before the receipts leave, as the driver cannot sync what another machine has written.
    """
    import ray
    import torch

    if given.token not in _kept:
        for worker in _kept.values():
            worker.__exit__()
        _kept.clear()
        refuse_versions(given.versions, [(socket.gethostname(), versions_here())])
        enter(given.folder)
        torch.set_num_threads(1)
        worker = ray.get(given.worker[0])
        _kept[given.token] = worker.__enter__()
    worker = _kept[given.token]
    results = [result for task in tasks for result in worker.run(task)]
    if sync:
        worker.sync()
    return results


@dataclass(frozen=True)
class _Given:
    """The part that all tasks of a merge have in common. worker: a reference, in a list, as Ray would else fetch it.

    versions: of the packages here, as a node may join later. folder: that relative paths begin in.
    """

    token: str
    worker: Sequence[Any]
    versions: Mapping[str, str]
    folder: Path


@dataclass
class _Call:
    """Tasks that go to a process together. copies: references to their results, one for each process that does them."""

    tasks: tuple[Task, ...]
    copies: list[Any] = field(default_factory=list)
    since: float = 0.0


@dataclass(frozen=True)
class _Pool:
    """A pool of processes of a connected cluster. cores, memory: of its least node.

    sync: it may have other machines, which bring to the disk what they have written.
    """

    ray: Any
    cores: int
    memory: int
    sync: bool

    @contextmanager
    def __call__(self, worker: Worker, count: int) -> Iterator[Executor]:
        """The executor, with `count` processes on the least node, and on others as many as their cores allow."""
        ray = self.ray
        resources = self._resources(worker, count)
        do = ray.remote(_do).options(**resources, max_retries=RETRIES, scheduling_strategy="SPREAD")
        given = ray.put(_Given(uuid.uuid4().hex, [ray.put(worker)], versions_here(), Path.cwd()))
        flying = dict[Any, _Call]()

        def launch(call: _Call) -> None:
            copy = do.remote(given, call.tasks, sync=self.sync)
            call.copies.append(copy)
            call.since, flying[copy] = time.monotonic(), call

        def unordered(tasks: Iterable[Task]) -> Iterator[Result]:
            processes = max(1, int(ray.cluster_resources().get("CPU", 0) / resources["num_cpus"]))
            waiting, took = deque(_together([*tasks], processes)), list[float]()
            while waiting or flying:
                while waiting and len(flying) < 2 * processes:
                    launch(waiting.popleft())
                ready, _ = ray.wait([*flying], timeout=LOOK_S)
                for copy in ready:
                    call = flying.pop(copy, None)
                    if call is None:  # the other copy was faster
                        continue
                    try:
                        results = result_of(ray, copy)
                    except Lost as error:
                        if any(other in flying for other in call.copies):
                            continue
                        sentence = "Ray has given up on a task: {found}; {cure}; the same command then goes on"
                        cure = "see its logs, and lower --memory or --threads if the nodes have too little memory"
                        raise PlanError(sentence, found=error, cure=cure) from None
                    took.append(time.monotonic() - call.since)
                    for other in call.copies:
                        if flying.pop(other, None):
                            ray.cancel(other, force=True)
                    yield from results
                if not waiting and len(flying) < processes and took:
                    limit = max(SLOW_S, SLOW * statistics.median(took))
                    for call in [*flying.values()]:
                        if len(call.copies) == 1 and time.monotonic() - call.since > limit:
                            launch(call)

        try:
            yield unordered
        finally:
            for copy in flying:
                ray.cancel(copy, force=True)

    def _resources(self, worker: Worker, count: int) -> dict[str, float]:
        """The resources that a process takes of its node. Raises PlanError if the cluster cannot give that."""
        options = worker.options
        if options.share * count > self.memory:
            sentence = "a node of the cluster has {found} for tasks, the budget is {expected}; {cure}"
            found, expected = format_size(self.memory), format_size(options.share * count)
            raise PlanError(sentence, found=found, expected=expected, cure="lower --memory")
        resources: dict[str, float] = {"num_cpus": self.cores / count, "memory": options.share}
        if count < self.cores:
            resources["num_cpus"] = self.cores // count  # Ray takes parts of one core, and whole ones
        if options.accelerator != HOST:
            if not self.ray.cluster_resources().get("GPU"):
                raise PlanError("the cluster has no GPU; {cure}", cure="leave --device out")
            resources["num_gpus"] = 1 / count
        return resources


def _together(tasks: Sequence[Task], processes: int) -> Iterator[_Call]:
    """The tasks in their order, as many to a call as leave each process some tens of calls."""
    size = min(MOST, max(1, len(tasks) // (processes * SHARES)))
    for first in range(0, len(tasks), size):
        yield _Call(tuple(tasks[first : first + size]))
