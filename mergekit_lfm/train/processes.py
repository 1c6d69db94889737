"""Several processes that train one model: each takes a share of a step's examples, and all gradients are added.

Losses are sums over terms with the number of terms, and both are added up before one is divided by the other: shares
weigh as they would in one process. All processes then do the same step, so that their parameters stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.launch import is_launched

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Group:
    """The processes that train together. rank: the number of this one; the first, 0, alone writes. count: how many."""

    rank: int = 0
    count: int = 1

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items that are this process's."""
        return items[self.rank :: self.count]

    def add(self, device: torch.device, *numbers: float) -> list[float]:
        """The sums over all processes. device: of the model."""
        if self.count == 1:
            return [*numbers]
        whole = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(whole)
        return [float(x) for x in whole.tolist()]

    def add_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Make each gradient the sum over all processes; one that no process has stays away."""
        if self.count == 1:
            return
        trained = [x for x in parameters.values() if x.requires_grad]
        there = torch.tensor([x.grad is not None for x in trained], dtype=torch.int32, device=trained[0].device)
        dist.all_reduce(there)
        for x, count in zip(trained, there.tolist(), strict=True):
            if count:
                gradient = torch.zeros_like(x) if x.grad is None else x.grad
                dist.all_reduce(gradient)
                x.grad = gradient

    def check_same(self, device: torch.device, step: int, batch_size: int) -> None:
        """Raise PlanError if the processes do not go on from one step, or are more than the examples of a batch."""
        if batch_size < self.count:
            raise PlanError(f"batch_size is {batch_size}; expected at least {self.count}, the number of processes")
        if self.count > 1:
            steps = torch.zeros(self.count, dtype=torch.int64, device=device)
            steps[self.rank] = step
            dist.all_reduce(steps)
            if len({*steps.tolist()}) > 1:
                raise PlanError(
                    f"the processes would go on after the steps {steps.tolist()}; expected one. Give a folder that all "
                    "of them see"
                )


def current_group() -> Group:
    """The processes of torch.distributed; this one alone if it was not initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return Group()
    return Group(dist.get_rank(), dist.get_world_size())


@contextmanager
def joined(device: str) -> Iterator[Group]:
    """The processes that torchrun has started, as a group that can train; this one alone without torchrun."""
    if not is_launched() or dist.is_initialized():
        yield current_group()
        return
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield current_group()
    finally:
        dist.destroy_process_group()
