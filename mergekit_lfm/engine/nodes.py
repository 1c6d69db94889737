"""Nodes of a cluster that give the bytes of this machine: what they must have in common."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.machine.resources import default_memory
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.store.state import FileState, state_of

SHOWN = 5  # files that a message names

# name of the node's host, version of each package there; None if it is not there
Versions = Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a cluster: bytes for its workers by default, its kind of processor, and inputs that it does not see."""

    name: str
    memory: int
    processor: str
    missing: tuple[str, ...]


def enter(folder: Path) -> None:
    """Make a folder that all nodes see the one that relative paths of a plan begin in."""
    try:
        os.chdir(folder)
    except OSError as error:
        sentence = "node {place} cannot enter {found}: {reason}; {cure}"
        cure = "run the command from a folder that all nodes share"
        raise PlanError(sentence, place=socket.gethostname(), found=folder, reason=error.strerror, cure=cure) from None


def look_at_node(folder: Path, inputs: Sequence[FileState]) -> Node:
    """Runs on a node: what it has. inputs: the states of the files of a plan, with paths from a folder."""
    import torch

    enter(folder)
    missing = tuple(str(state.path) for state in inputs if not _is_there(state))
    return Node(socket.gethostname(), default_memory(), torch.backends.cpu.get_cpu_capability(), missing)


def _is_there(state: FileState) -> bool:
    """True if this machine sees the file in the state in which the merge was planned."""
    try:
        return state_of(state.path) == state
    except OSError:
        return False


def refuse_versions(here: Versions, nodes: Iterable[tuple[str, Versions]]) -> None:
    """Raise PlanError if a package of a node has another version than here."""
    problems = []
    for name, found in sorted(nodes, key=lambda node: node[0]):
        for package, version in here.items():
            if found.get(package) != version:
                there = found.get(package) or "none"
                problems.append(f"node {name} has {package} {there}, this machine {version}")
    if problems:
        text = several("the nodes of the cluster have other packages", [*dict.fromkeys(problems)])
        raise PlanError("{found}\n{cure}", found=text, cure="Install the same versions on all of them")


def refuse_unlike(nodes: Sequence[Node], plan: Plan) -> None:
    """Raise PlanError if a node does not see the plan's inputs, or if sums could differ between the nodes."""
    problems = []
    for node in nodes:
        if node.missing:
            more = f" and {len(node.missing) - SHOWN} more" if len(node.missing) > SHOWN else ""
            problems.append(
                f"node {node.name} does not see {', '.join(node.missing[:SHOWN])}{more} as this machine does"
            )
    if problems:
        text = several("inputs are not on a file system that all nodes share", [*dict.fromkeys(problems)])
        raise PlanError("{found}\n{cure}", found=text, cure="Put them where each node has them by the same path")
    kinds = {node.processor: node.name for node in nodes}
    if len(kinds) > 1 and (plan.matrices or any(job.needs_sums or job.by_row for job in plan.tensors)):
        text = ", ".join(f"{name} has {kind}" for kind, name in sorted(kinds.items()))
        raise PlanError(
            "the nodes have processors of several kinds, whose sums differ in the last bits: {found}; {cure}",
            found=text,
            cure="set ATEN_CPU_CAPABILITY to the least of them (default, avx2) where Ray is started on each node",
        )
