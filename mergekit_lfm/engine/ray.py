"""The executor on a Ray cluster: tasks of some hundred bytes go to its nodes, and receipts come back.

The nodes share a file system. Their processes read inputs from it and write byte ranges of the output to it; no tensor
passes through Ray. What is done twice writes the same bytes: so Ray does the tasks of a lost process or node again, and
a task that takes far longer than the others is also given to another process, whichever ends first.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from mergekit_lfm.engine.nodes import Node, enter, look_at_node, refuse_unlike, refuse_versions
from mergekit_lfm.engine.sites import Engine, Site
from mergekit_lfm.engine.tasks import Executor, Result, Task
from mergekit_lfm.engine.worker import Worker
from mergekit_lfm.errors import PlanError, reason
from mergekit_lfm.machine.accelerators import HOST
from mergekit_lfm.machine.resources import default_threads
from mergekit_lfm.machine.sizes import format_size
from mergekit_lfm.plan.plan import Plan

# In such a cluster nothing is reported, and its processes have the priority of this one.
OURS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
OBJECTS = 80 << 20  # bytes for Ray's objects in such a cluster: the least that it takes
REACH_S = 20  # to connect to a cluster's first node
ANSWER_S = 300  # for a node to say what it has: it may start processes and import torch for that
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
    try:
        ray: Any = import_module("ray")
    except ImportError:
        sentence = "--engine ray needs Ray: {cure}"
        raise PlanError(sentence, cure='pip install "mergekit_lfm[ray]"') from None
    with _connected(ray, address):
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        looks = _look(ray, plan, nodes)
        refuse_unlike(looks, plan)
        cores = int(min(node["Resources"]["CPU"] for node in nodes))
        memory = min([*(look.memory for look in looks), *(int(node["Resources"]["memory"]) for node in nodes)])
        yield Site(_Pool(ray, cores, memory, len(nodes) > 1), memory, cores)


@contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """A connection to the cluster; one that the program has made before is used, if it is to the same address."""
    if ray.is_initialized():
        there = ray.get_runtime_context().gcs_address
        if address not in (None, there):
            sentence = "this program is connected to the Ray cluster {found}, the merge asks for {expected}; {cure}"
            raise PlanError(sentence, found=there, expected=address, cure="call ray.shutdown() before")
        yield
        return
    if address is not None:
        _reach(address)
    how: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        for name, value in OURS.items():
            os.environ.setdefault(name, value)
        how |= {"num_cpus": default_threads(), "object_store_memory": OBJECTS, "include_dashboard": False}
    try:
        ray.init(address=address or "local", **how)
    except Exception as error:  # of several classes, some of them not Ray's
        cure = "see that it runs, and that RAY_AUTH_MODE and its token are the same here as there"
        sentence = "no connection to the Ray cluster {place}: {found}; {cure}"
        raise PlanError(sentence, place=address, found=reason(error), cure=cure) from None
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise PlanError if nothing answers at an address: Ray would try for ten minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    sentence = "no Ray cluster answers at {place}: {found}; {cure}"
    cure = "give the address that `ray start --head` printed, as HOST:PORT"
    if not (host and port.isdigit()):
        raise PlanError(sentence, place=address, found="it has no host, or no port", cure=cure)
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except (OSError, OverflowError) as error:
        raise PlanError(sentence, place=address, found=reason(error), cure=cure) from None


def _look(ray: Any, plan: Plan, nodes: Sequence[Any]) -> list[Node]:
    """What the nodes have. Raises PlanError if their packages are not those of this machine."""

    def versions() -> dict[str, str | None]:  # by value, as a node may lack the package
        found: dict[str, str | None] = {"mergekit_lfm": None, "torch": None}
        try:
            from mergekit_lfm.version import __version__

            found["mergekit_lfm"] = __version__
            import torch

            found["torch"] = str(torch.__version__)
        except ImportError:
            pass
        return found

    names = [node["NodeManagerHostname"] + (f" ({node['NodeManagerAddress']})") for node in nodes]
    answers = _ask(ray, versions, nodes)
    refuse_versions(versions(), zip(names, answers, strict=True))
    found: list[Node] = _ask(ray, partial(look_at_node, Path.cwd(), plan.inputs), nodes)
    return found


def _ask(ray: Any, question: Callable[[], Any], nodes: Sequence[Any]) -> list[Any]:
    """The answers of the nodes. Raises PlanError if one gives none."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def asked() -> Any:
        return question()

    calls = [
        ray.remote(asked)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote()
        for node in nodes
    ]
    ready, _ = ray.wait(calls, num_returns=len(calls), timeout=ANSWER_S)
    for call, node in zip(calls, nodes, strict=True):
        if call not in ready:
            sentence = "node {place} did not answer in {found} s; {cure}"
            cure = "see the logs of Ray there, or remove it from the cluster"
            raise PlanError(sentence, place=node["NodeManagerHostname"], found=ANSWER_S, cure=cure)
    return [_result(ray, call) for call in calls]


def _result(ray: Any, call: Any) -> Any:
    """The result of a call. Raises the exception of the task itself, PlanError for those of Ray."""
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        cure = "see the logs of Ray on its nodes; lower --memory or --threads if they have too little memory"
        sentence = "Ray has given up on a task after {count} tries: {found}; {cure}; the same command then goes on"
        raise PlanError(sentence, count=RETRIES + 1, found=reason(error), cure=cure) from None


def _do(token: str, packed: Sequence[Any], folder: Path, tasks: Sequence[Task], *, sync: bool) -> list[Result]:
    """Runs in a process of Ray: do tasks by the worker that `packed` refers to; it is kept for the next call.

    sync: the data reach the disk before the receipts leave, as the driver cannot sync what another machine has written.
    """
    import ray
    import torch

    if token not in _kept:
        for worker in _kept.values():
            worker.__exit__()
        _kept.clear()
        enter(folder)
        torch.set_num_threads(1)
        worker = ray.get(packed[0])
        _kept[token] = worker.__enter__()
    worker = _kept[token]
    results = [result for task in tasks for result in worker.run(task)]
    if sync:
        worker.sync()
    return results


@dataclass
class _Call:
    """Tasks that go to a process together. copies: references to their results, one for each process that does them."""

    tasks: tuple[Task, ...]
    copies: list[Any] = field(default_factory=list)
    since: float = 0.0


@dataclass(frozen=True)
class _Pool:
    """A pool of processes of a connected cluster. cores, memory: of its least node. several: it has more than one."""

    ray: Any
    cores: int
    memory: int
    several: bool

    @contextmanager
    def __call__(self, worker: Worker, count: int) -> Iterator[Executor]:
        """The executor, with `count` processes on the least node, and on others as many as their cores allow."""
        ray = self.ray
        resources = self._resources(worker, count)
        do = ray.remote(_do).options(**resources, max_retries=RETRIES, scheduling_strategy="SPREAD")
        given = uuid.uuid4().hex, [ray.put(worker)], Path.cwd()
        flying = dict[Any, _Call]()

        def launch(call: _Call) -> None:
            copy = do.remote(*given, call.tasks, sync=self.several)
            call.copies.append(copy)
            call.since, flying[copy] = time.monotonic(), call

        def unordered(tasks: Iterable[Task]) -> Iterator[Result]:
            processes = max(1, int(ray.cluster_resources()["CPU"] / resources["num_cpus"]))
            waiting, took = deque(_together([*tasks], processes)), list[float]()
            while waiting or flying:
                while waiting and len(flying) < 2 * processes:
                    launch(waiting.popleft())
                ready, _ = ray.wait([*flying], timeout=LOOK_S)
                for copy in ready:
                    call = flying.pop(copy, None)
                    if call is None:  # the other copy was faster
                        continue
                    results = _result(ray, copy)
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
        """What a process takes of its node. Raises PlanError if the cluster cannot give that."""
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
