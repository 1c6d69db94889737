"""A connection with a Ray cluster, and the answers of its nodes before work is given to them."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from mergekit_lfm.engine.nodes import Node, look_at_node, refuse_versions
from mergekit_lfm.errors import PlanError, reason
from mergekit_lfm.machine.resources import default_threads
from mergekit_lfm.plan.plan import Plan

# In a cluster for one run nothing is reported, and its processes have the priority of this one.
OURS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
OBJECTS = 80 << 20  # bytes for Ray's objects in such a cluster: the least that it takes
REACH_S = 20  # to connect to a cluster's first node
ANSWER_S = 300  # for a node to say what it has: it may start processes and import torch for that


class Lost(Exception):
    """Ray has not done a task, though it tried."""


def import_ray() -> Any:
    """The library. Raises PlanError if it is not installed."""
    try:
        return import_module("ray")
    except ImportError:
        raise PlanError("--engine ray needs Ray: {cure}", cure='pip install "mergekit_lfm[ray]"') from None


@contextmanager
def connected(ray: Any, address: str | None) -> Iterator[None]:
    """A connection to the cluster; one that the program has made before is used, if it is to the same address."""
    if ray.is_initialized():
        there = ray.get_runtime_context().gcs_address
        if address is None or _numeric(address) != _numeric(there):
            sentence = "this program is connected to the Ray cluster {found}, the merge asks for {expected}; {cure}"
            cure = "give that address, or call ray.shutdown() before"
            raise PlanError(sentence, found=there, expected=address or "one of its own", cure=cure)
        yield
        return
    if address is not None:
        _reach(address)
    how: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        for name, value in OURS.items():
            os.environ.setdefault(name, value)
        how |= {"num_cpus": default_threads(), "object_store_memory": OBJECTS, "include_dashboard": False}
    main = threading.current_thread() is threading.main_thread()
    signals = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(address=address or "local", **how)
    except Exception as error:  # of several classes, some of them not Ray's
        cure = "see that it runs, and that RAY_AUTH_MODE and its token are the same here as there"
        sentence = "no connection to the Ray cluster {place}: {found}; {cure}"
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"  # its lines tell versions that differ
        raise PlanError(sentence, place=address or "of this machine", found=found, cure=cure) from None
    finally:
        for each, handler in signals.items() if main else ():  # Ray has its own, which say nothing
            signal.signal(each, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _numeric(address: str) -> str:
    """An address with the number of its host."""
    host, _, port = address.rpartition(":")
    try:
        return f"{socket.gethostbyname(host)}:{port}"
    except OSError:
        return address


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


def versions_here() -> dict[str, str]:
    """The versions of the packages that all nodes must have."""
    import torch

    from mergekit_lfm.version import __version__

    return {"mergekit_lfm": __version__, "torch": str(torch.__version__)}


def look_at(ray: Any, plan: Plan, nodes: Sequence[Any]) -> list[Node]:
    """The nodes, and what they have. Raises PlanError if their packages are not those of this machine."""

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

    answers = _ask(ray, versions, nodes)
    refuse_versions(versions_here(), ((_name(node), found) for node, found in answers))
    return [
        look for _, look in _ask(ray, partial(look_at_node, Path.cwd(), plan.inputs), [node for node, _ in answers])
    ]


def _name(node: Any) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _ask(ray: Any, question: Callable[[], Any], nodes: Sequence[Any]) -> list[tuple[Any, Any]]:
    """The answers of the nodes, but for those that are lost meanwhile. Raises PlanError if another gives none."""
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
    answers = list[tuple[Any, Any]]()
    for call, node in zip(calls, nodes, strict=True):
        try:
            if call not in ready:
                sentence = "node {place} did not answer in {found} s; {cure}"
                cure = "see the logs of Ray there, or remove it from the cluster"
                raise PlanError(sentence, place=_name(node), found=ANSWER_S, cure=cure)
            answers.append((node, result_of(ray, call)))
        except Lost as error:
            if any(each["Alive"] for each in ray.nodes() if each["NodeID"] == node["NodeID"]):
                raise PlanError("node {place} gives no answer: {found}", place=_name(node), found=error) from None
    if not answers:
        raise PlanError("the Ray cluster has no node with a core for tasks; {cure}", cure="see `ray status`")
    return answers


def result_of(ray: Any, call: Any) -> Any:
    """The result of a call. Raises the exception of the task itself, `Lost` for those of Ray."""
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise Lost(reason(error)) from None
