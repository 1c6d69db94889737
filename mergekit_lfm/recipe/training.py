"""How a model is trained: the number of steps, the rate of each, and when to look at the development set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mergekit_lfm.errors import PlanError, did_you_mean

Schedule = Literal["constant", "linear", "cosine"]
SCHEDULES = ("constant", "linear", "cosine")
Optimizer = Literal["adamw", "sgd"]
OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters with settings of their own. match: a pattern of their names, as `*.layers.0.*`, in the way of fnmatch.

    learning_rate, weight_decay: those of the training if None; the rate rises and falls as that does.
    """

    match: str
    learning_rate: float | None = None
    weight_decay: float | None = None

    @property
    def problems(self) -> list[str]:
        """The settings that are out of range, in words."""
        problems, place = list[str](), f"groups, {self.match!r}"
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            problems.append(f"{place}: learning_rate is {self.learning_rate}; expected a number above 0")
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            problems.append(f"{place}: weight_decay is {self.weight_decay}; expected at least 0")
        return problems


@dataclass(frozen=True, slots=True)
class Options:
    """The settings of a training.

    steps: of the optimizer. batch_size: examples of a step; accumulate: into how many parts they are cut, so that less
    is in memory. schedule: of the learning rate after the warm-up, which takes the share `warmup` of the steps: to 0 by
    a line or half a cosine, or constant. weight_decay: of tensors of two or more axes. clip: the largest norm of the
    gradient, 0 for any. evaluate_every: steps between two looks at the development set, None for one at the end.
    patience: looks without a better loss before training stops, None for none; the best state is kept. checkpointing:
    compute activations again in place of keeping them. autocast: matrix products in bfloat16. optimizer: "adamw", or
    "sgd", plain descent. groups: parameters with a rate or a weight decay of their own; each is in the first group that
    it matches.
    """

    steps: int = 200
    batch_size: int = 16
    learning_rate: float = 2e-5
    schedule: Schedule = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    seed: int = 0
    evaluate_every: int | None = None
    patience: int | None = None
    checkpointing: bool = False
    autocast: bool = False
    optimizer: Optimizer = "adamw"
    groups: tuple[Group, ...] = ()

    def __post_init__(self) -> None:
        """Raise PlanError for settings out of range, with all of them."""
        problems = [
            f"{name} is {value}; expected at least {least}"
            for name, value, least in (
                ("steps", self.steps, 1),
                ("batch_size", self.batch_size, 1),
                ("accumulate", self.accumulate, 1),
                ("evaluate_every", self.evaluate_every, 1),
                ("patience", self.patience, 1),
                ("weight_decay", self.weight_decay, 0),
                ("clip", self.clip, 0),
            )
            if value is not None and not least <= value < math.inf
        ]
        if not 0 < self.learning_rate < math.inf:
            problems.append(f"learning_rate is {self.learning_rate}; expected a number above 0")
        if not 0 <= self.warmup <= 1:
            problems.append(f"warmup is {self.warmup}; expected a share of the steps from 0 to 1")
        if self.accumulate > self.batch_size:
            problems.append(f"accumulate is {self.accumulate}; expected at most batch_size, {self.batch_size}")
        for name, value, known in (
            ("schedule", self.schedule, SCHEDULES),
            ("optimizer", self.optimizer, OPTIMIZERS),
        ):
            if value not in known:
                cure = did_you_mean(value, known)
                problems.append(f"{name} is {value!r}; expected {', '.join(known)}; {cure}")
        problems += [problem for group in self.groups for problem in group.problems]
        if problems:
            raise PlanError("; ".join(problems))

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        shares = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.learning_rate * shares[self.schedule]
