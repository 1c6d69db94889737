"""Actions at the steps of a training: snapshots, averages of weights, projections, schedules of freezing.

The memory of a hook is saved with the state of the training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from mergekit_lfm.artifacts.header import save_tensors
from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.identity import spec_of
from mergekit_lfm.train.processes import current_group

SNAPSHOT = "step-{:06}.safetensors"

Parameters = Mapping[str, nn.Parameter]  # all that are trained at some step, by name


class Hook:
    """Something that happens at steps; each part by default does nothing. Steps count from 1 where they are done.

    Hooks act in the order in which they are given. replaces: whether it puts other weights in place of the last ones.
    memory: tensors by the names of parameters, which are made by `begin` and saved with the state of the training.
    """

    replaces = False
    memory: Mapping[str, Tensor] = MappingProxyType({})

    def begin(self, parameters: Parameters) -> None:
        """Called once before the first step, also where a training goes on, before `restore`."""

    def before(self, step: int, parameters: Parameters) -> None:
        """Called before a step, from 0, also before the first one that is done again."""

    def correct(self, parameters: Parameters) -> None:
        """Called when a step's gradients are there."""

    def after(self, done: int, parameters: Parameters) -> None:
        """Called after so many steps."""

    def finish(self, parameters: Parameters) -> None:
        """Called after the last step."""

    def restore(self, memory: Mapping[str, Tensor]) -> None:
        """Take a memory that was saved."""
        for name, x in memory.items():
            self.memory[name].copy_(x)


class Snapshots(Hook):
    """Saves what is trained to a folder every so many steps: for averages along a training (SWA, LAWA, soups)."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every

    def after(self, done: int, parameters: Parameters) -> None:
        if done % self.every == 0 and current_group().rank == 0:
            parts = {name: x.detach() for name, x in parameters.items()}
            specs = [spec_of(name, x) for name, x in parts.items()]
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(self.folder / SNAPSHOT.format(done), specs, parts.__getitem__, {"format": "pt"})


class MovingAverage(Hook):
    """Puts an exponential moving average of what is trained in its place at the end.

    decay: of a step; in the first steps less, (1 + steps) / (10 + steps), so that the start is forgotten.
    """

    replaces = True

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise PlanError(f"decay is {decay}; expected a number from 0 to below 1")
        self.decay = decay

    def begin(self, parameters: Parameters) -> None:
        self.memory = {name: x.detach().float().clone() for name, x in parameters.items()}

    @torch.no_grad()
    def after(self, done: int, parameters: Parameters) -> None:
        decay = min(self.decay, (1 + done) / (10 + done))
        for name, x in parameters.items():
            self.memory[name].lerp_(x.float(), 1 - decay)

    @torch.no_grad()
    def finish(self, parameters: Parameters) -> None:
        for name, x in parameters.items():
            x.copy_(self.memory[name])


class Ball(Hook):
    """Keeps what is trained near its start: within a norm of `radius` of the change, after each step.

    "l2": of the whole change. "linf": of every entry. Source: Zhu et al. 2020, arXiv 2012.00363, equation 3.
    """

    def __init__(self, radius: float, norm: Literal["l2", "linf"] = "linf") -> None:
        if not radius > 0:
            raise PlanError(f"radius is {radius}; expected a number above 0")
        self.radius, self.norm = radius, norm

    def begin(self, parameters: Parameters) -> None:
        self.memory = {name: x.detach().clone() for name, x in parameters.items()}

    @torch.no_grad()
    def after(self, done: int, parameters: Parameters) -> None:  # noqa: ARG002
        changes = {name: x - self.memory[name] for name, x in parameters.items()}
        if self.norm == "linf":
            changes = {name: x.clamp(-self.radius, self.radius) for name, x in changes.items()}
        else:
            length = torch.stack([x.double().square().sum() for x in changes.values()]).sum().sqrt().item()
            if length <= self.radius:
                return
            changes = {name: x * (self.radius / length) for name, x in changes.items()}
        for name, x in parameters.items():
            x.copy_(self.memory[name] + changes[name])


class Pull(Hook):
    """Pulls what is trained towards other weights every so many steps: x becomes share * x + (1 - share) * other.

    others: the weights at that time, such as the mean of a population. Source: Jolicoeur-Martineau et al. 2023 (PAPA),
    arXiv 2304.03094, section 3.
    """

    def __init__(self, others: Callable[[], Mapping[str, Tensor]], share: float = 0.99, every: int = 10) -> None:
        self.others, self.share, self.every = others, share, every

    @torch.no_grad()
    def after(self, done: int, parameters: Parameters) -> None:
        if done % self.every == 0:
            others = self.others()
            for name, x in parameters.items():
                x.lerp_(others[name].to(x), 1 - self.share)


class Phases(Hook):
    """Trains more or other parameters as training goes on. phases: (steps done from which on, names), in order.

    Parameters that no phase names are trained all the time.
    """

    def __init__(self, phases: Sequence[tuple[int, frozenset[str]]]) -> None:
        self.phases = tuple(phases)
        self._named = frozenset[str]().union(*(names for _, names in self.phases))

    def before(self, step: int, parameters: Parameters) -> None:
        names = next(names for start, names in reversed(self.phases) if start <= step)
        for name, x in parameters.items():
            if name in self._named:
                x.requires_grad_(name in names)
                x.grad = x.grad if name in names else None


class Masks(Hook):
    """Trains some entries of tensors alone: the gradients of all others are 0. masks: 1 and 0, by name."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = masks

    def correct(self, parameters: Parameters) -> None:
        for name, x in parameters.items():
            if x.grad is not None and name in self.masks:
                x.grad.mul_(self.masks[name].to(x.grad))
