"""The settings of a generator's training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mergekit_lfm.errors import PlanError

Outer = Literal["go_on", "fresh", "reptile"]
OUTERS, LATENTS = ("go_on", "fresh", "reptile"), ("drawn", "learned")


@dataclass(frozen=True, slots=True)
class Generation:
    """How a generator is trained. rounds: each of `generator_steps` of it, and then `student_steps` of the student.

    outer: the generator of the next round is this one's ("go_on"), a new one ("fresh"), or the one before moved by
    `outer_rate` towards this one ("reptile"). latents: drawn for each step, or drawn once a round and trained with the
    generator ("learned"); the student then learns from a bank of at most `bank` images. conditional: the generator is
    given classes. exponential: terms that count as exp(value - its value before), so that a rise counts most. stacked:
    the generator is one of groups for several teachers, and the student's blocks are trained after it, as
    `Amalgamation` does. Source of exponential terms: Han et al. 2020, arXiv 2011.03749; of Reptile here: Fang et al.
    2022, arXiv 2112.06253.
    """

    rounds: int = 400
    generator_steps: int = 1
    student_steps: int = 3
    batch_size: int = 128
    learning_rate: float = 2e-3
    outer: Outer = "go_on"
    outer_rate: float = 0.5
    latents: Literal["drawn", "learned"] = "drawn"
    conditional: bool = False
    exponential: tuple[str, ...] = ()
    bank: int = 2048
    stacked: bool = False

    def __post_init__(self) -> None:
        """Raise PlanError for settings out of range, with all of them."""
        least = (("rounds", 1), ("generator_steps", 1), ("student_steps", 0), ("batch_size", 2), ("bank", 2))
        problems = [f"{n} is {getattr(self, n)}; expected at least {m}" for n, m in least if getattr(self, n) < m]
        if not 0 < self.learning_rate < math.inf:
            problems.append(f"learning_rate is {self.learning_rate}; expected a number above 0")
        if not 0 < self.outer_rate <= 1:
            problems.append(f"outer_rate is {self.outer_rate}; expected a share above 0, up to 1")
        if self.outer not in OUTERS:
            problems.append(f"outer is {self.outer!r}; expected {', '.join(OUTERS)}")
        if self.latents not in LATENTS:
            problems.append(f"latents is {self.latents!r}; expected {' or '.join(LATENTS)}")
        plain = (self.outer, self.latents, self.conditional, self.exponential) == ("go_on", "drawn", False, ())
        if self.stacked and not plain:
            problems.append("stacked is True beside outer, latents, conditional or exponential; leave these out")
        if problems:
            raise PlanError("; ".join(problems))
