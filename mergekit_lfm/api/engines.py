"""Where the work of a merge is done: the engines by their names, a part of it, the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from mergekit_lfm.errors import PlanError, did_you_mean
from mergekit_lfm.machine.accelerators import Accelerator, accelerator_of
from mergekit_lfm.machine.devices import find_gpu
from mergekit_lfm.machine.resources import default_memory, default_threads

if TYPE_CHECKING:
    from mergekit_lfm.api.planned import PlannedMerge
    from mergekit_lfm.engine.sites import Engine
    from mergekit_lfm.plan.plan import Plan
    from mergekit_lfm.recipe.recipe import Recipe

Name = Literal["threads", "ray"]
LOCAL = "local"  # in place of an address: a cluster of this machine, for one run


def check_engine(name: str, ray_address: str | None) -> None:
    """Raise PlanError for an engine that is not there, or an address that does not belong to it."""
    if name not in get_args(Name):
        raise PlanError("{found} is not an engine; {cure}", found=name, cure=did_you_mean(name, get_args(Name)))
    if name != "ray" and ray_address is not None:
        raise PlanError("a Ray address has no effect on {found}; {cure}", found=name, cure="give --engine ray")
    if name == "ray" and ray_address in (None, "", "auto"):
        raise PlanError(
            "--engine ray has {found}, {expected}; {cure}",
            found=f"the address {ray_address}" if ray_address else "no address",
            expected="which could be anyone's cluster"
            if ray_address
            else "and takes no cluster that it happens to find",
            cure=f"give --ray-address HOST:PORT, as `ray start --head` prints it, or {LOCAL} for this machine alone",
        )


def find_engine(name: str, ray_address: str | None) -> Engine:
    """The engine of a name, which `check_engine` has accepted."""
    if name == "ray":
        from mergekit_lfm.engine.ray import ray_engine

        assert ray_address is not None
        return ray_engine(None if ray_address == LOCAL else ray_address)
    from mergekit_lfm.engine.sites import this_machine

    return this_machine


@dataclass(frozen=True, slots=True)
class Started:
    """The place of a process among those of a launcher. part: its own, of all. beside: how many are on this machine."""

    part: tuple[int, int]
    beside: int
    source: str


# Of each launcher: the number of a process, from 0, how many there are, in all and on this machine.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),  # torchrun and its like
    # srun, which gives each its own cores. A batch script has SLURM_NTASKS, too, and is one process.
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", None),
)


def find_started(environment: Mapping[str, str]) -> Started | None:
    """The place that this process's launcher gives it; None without one, or if it started no others."""
    for number, count, local in LAUNCHERS:
        try:
            own, several = int(environment[number]), int(environment[count])
            beside = int(environment.get(local or "", 1))
        except (KeyError, ValueError):
            continue
        if several > 1 and 0 <= own < several:
            return Started((own + 1, several), max(1, beside), f"{number} and {count}")
    return None


def check_part(part: tuple[int, int] | None, planned: PlannedMerge, *, resume: bool, engine: str) -> None:
    """Raise PlanError for a number without a part, or work that several runs cannot share."""
    if part is None:
        return
    if not (isinstance(part, tuple) and [type(each) for each in part] == [int, int]):
        raise PlanError(
            "{found} is not a part; expected {expected}", found=repr(part), expected="two numbers, as (1, 4)"
        )
    number, count = part
    if not 1 <= number <= count:
        expected = f"1/{count} to {count}/{count}" if count > 0 else "as 1/4"
        raise PlanError("{found} is not a part; expected {expected}", found=f"{number}/{count}", expected=expected)
    reasons = {
        "OUT is in a bucket, and each run would make it for itself": planned.staged,
        "its recipe has stages": planned.stages is not None,
        "its recipe aligns or edits models before they are merged": bool(planned.plan.pending or planned.plan.unedited),
        "--no-resume deletes what other parts have done": not resume,
        "--engine ray shares the work itself": engine != "threads",
    }
    found = [text for text, is_so in reasons.items() if is_so]
    if found:
        cure = "--partition 1/1 does all of it in one run"
        if planned.staged and planned.goal is not None:
            cure = f"give a folder that all runs see as OUT, and --push-to {planned.goal.repo}; or {cure}"
        elif "recipe" in found[0]:
            cure = f"make its models first, by recipes of their own, and name them here; or {cure}"
        raise PlanError("a merge is not shared by several runs, as {found}; {cure}", found=found[0], cure=cure)


def check_site(ray_address: str | None, planned: PlannedMerge) -> None:
    """Raise PlanError if the output is to be made in a folder that the engine's nodes do not see."""
    if planned.staged and ray_address not in (None, LOCAL):
        sentence = "OUT is in a bucket, and would be made in the cache, which other nodes of {found} do not see; {cure}"
        cure = "give a folder that they all see as OUT, and --push-to with the address"
        raise PlanError(sentence, found=ray_address, cure=cure)


def stream_models(plan: Plan, memory: int | None, threads: int | None) -> None:
    """Have the plan's models that are elsewhere read by ranges, in about an eighth of the memory."""
    for model in plan.models:
        model.stream((memory or default_memory()) // (8 * len(plan.models)), threads or default_threads())


@contextmanager
def ending_streams(plan: Plan) -> Iterator[None]:
    """End the requests for ranges with this block."""
    try:
        yield
    finally:
        for reader in {file.ranges for model in plan.models for file in model.files}:
            if reader is not None:
                reader.close()


def find_accelerator(recipe: Recipe, device: str | None) -> Accelerator:
    """The device that `device`, else the recipe, names. Raises PlanError if it does not exist."""
    name = recipe.device if device is None else device
    return accelerator_of(None if name == "cpu" else find_gpu(name))
