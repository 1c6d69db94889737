"""A student's steps: towards the teacher's scores of images that were made, with memory, attacks, and wrong labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mergekit_lfm.distill.divergences import DIVERGENCES, kd_divergence
from mergekit_lfm.distill.image_terms import check_finite
from mergekit_lfm.distill.making import Making
from mergekit_lfm.errors import PlanError
from mergekit_lfm.runtime.load import logits, run
from mergekit_lfm.train.examples import seed_of

Memory = Literal["none", "replay", "meta"]
MEMORIES = ("none", "replay", "meta")
ATTACK_STEPS = 4  # of projected gradient ascent
SURE = 0.95  # of the noise matrix: the share of the teacher's labels that are right


@dataclass(frozen=True, slots=True)
class Learning:
    """How a student learns from images. learning_rate: of Adam; it falls by half a cosine to 0.

    temperature, divergence: of `kd_divergence`. memory: "replay" adds the loss on remembered images; "meta" has it at
    the parameters after a step of `inner_rate` on the new ones. Source: Patel et al. 2023, arXiv 2302.14290, equation
    of the meta-objective. attack: the largest change of a pixel by which images are made hard for the student, 0 for
    none. noise_matrix: add the cross-entropy of the teacher's labels by the student's predictions times a matrix of how
    labels may err, which is trained with it. Source: Chen et al. 2021, CVPR (DFND).
    """

    learning_rate: float = 5e-3
    batch_size: int = 128
    temperature: float = 2.0
    divergence: str = "forward"
    memory: Memory = "none"
    inner_rate: float = 1e-3
    attack: float = 0.0
    noise_matrix: bool = False

    def __post_init__(self) -> None:
        """Raise PlanError for settings out of range, with all of them."""
        problems = [
            f"{name} is {value!r}; expected {expected}"
            for name, value, expected, right in (
                ("learning_rate", self.learning_rate, "a number above 0", 0 < self.learning_rate < math.inf),
                ("batch_size", self.batch_size, "at least 2", self.batch_size >= 2),
                ("temperature", self.temperature, "a number above 0", 0 < self.temperature < math.inf),
                ("divergence", self.divergence, ", ".join(DIVERGENCES), self.divergence in DIVERGENCES),
                ("memory", self.memory, ", ".join(MEMORIES), self.memory in MEMORIES),
                ("inner_rate", self.inner_rate, "a number above 0", 0 < self.inner_rate < math.inf),
                ("attack", self.attack, "at least 0", 0 <= self.attack < math.inf),
            )
            if not right
        ]
        if problems:
            raise PlanError("; ".join(problems))


class NoiseMatrix(nn.Module):
    """How a teacher's labels err, [classes, classes]: 0.95 on the diagonal, the rest of each row is learned.

    Source: Chen et al. 2021, CVPR (DFND), with the share of right labels as a constant.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(classes, classes))

    def forward(self) -> Tensor:
        """The matrix; its rows sum to 1."""
        diagonal = torch.eye(len(self.scores), dtype=torch.bool, device=self.scores.device)
        others = self.scores.masked_fill(diagonal, -math.inf).softmax(-1)
        return SURE * diagonal + (1 - SURE) * others


Scored = tuple[Tensor, Tensor]  # images [n, channels, h, w], and the teacher's scores [n, classes]


class Learner:
    """A student with its optimizer. steps: all that there will be, for the rate.

    pixels: the least and the largest value of a pixel, which attacks leave as they are.
    """

    def __init__(
        self,
        student: nn.Module,
        classes: int,
        options: Learning,
        steps: int,
        seed: int,
        pixels: tuple[float, float] = (-math.inf, math.inf),
    ) -> None:
        self.pixels = pixels
        self.student, self.options, self.steps, self.seed, self.done = student, options, steps, seed, 0
        device = next(student.parameters()).device
        self.matrix = NoiseMatrix(classes).to(device) if options.noise_matrix else None
        trained = [x for x in student.parameters() if x.requires_grad]
        extra = [] if self.matrix is None else [*self.matrix.parameters()]
        self.optimizer = torch.optim.Adam([*trained, *extra], lr=options.learning_rate)

    def join(self, making: Making) -> None:
        """Be kept in the state of a making."""
        making.hold("student", self.student, self.optimizer)
        if self.matrix is not None:
            making.hold("labels", self.matrix)

    def step(self, new: Scored, remembered: Scored | None = None) -> float:
        """One step on new images, with remembered ones if there are some; the loss."""
        self.student.train()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed_of(self.seed, "student", self.done))  # for dropout
            loss = self._loss(new, remembered)
        check_finite(loss, f"the student's loss in step {self.done + 1}", self.options.learning_rate)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        share = (1 + math.cos(math.pi * self.done / max(1, self.steps))) / 2
        self.optimizer.param_groups[0]["lr"] = self.options.learning_rate * share
        self.optimizer.step()
        self.student.eval()
        self.done += 1
        return float(loss.detach())

    def _loss(self, new: Scored, remembered: Scored | None) -> Tensor:
        images, scores = new
        mine = logits(run(self.student, (images,)))
        loss = self._apart(mine, scores)
        if self.options.attack:
            loss = (loss + self._apart(logits(run(self.student, (self._attacked(new),))), scores)) / 2
        if self.matrix is not None:
            chances = mine.softmax(-1) @ self.matrix()
            loss = loss + nn.functional.nll_loss(chances.clamp(min=1e-12).log(), scores.argmax(-1))
        if remembered is None or self.options.memory == "none":
            return loss
        if self.options.memory == "meta":
            output = torch.func.functional_call(self.student, self._moved(loss), (remembered[0],))
        else:
            output = run(self.student, (remembered[0],))
        return loss + self._apart(logits(output), remembered[1])

    def _apart(self, mine: Tensor, scores: Tensor) -> Tensor:
        """The mean divergence of the student's scores from the teacher's."""
        return kd_divergence(mine, scores, self.options.temperature, self.options.divergence) / len(scores)

    def _moved(self, loss: Tensor) -> dict[str, Tensor]:
        """The student's parameters after a step of plain descent on the loss, with its second derivatives."""
        named = {name: x for name, x in self.student.named_parameters() if x.requires_grad}
        slopes = torch.autograd.grad(loss, [*named.values()], create_graph=True)
        return {name: x - self.options.inner_rate * g for (name, x), g in zip(named.items(), slopes, strict=True)}

    def _attacked(self, scored: Scored) -> Tensor:
        """The images changed by up to `attack` in each pixel, so that the student is far from the teacher's scores.

        Pixels stay within their range. The scores are those of the images before.

        Source: Madry et al. 2017, arXiv 1706.06083, from the image itself and a small random step.
        """
        images, scores = scored
        most = self.options.attack
        self.student.eval()
        generator = torch.Generator().manual_seed(seed_of(self.seed, "attack", self.done))
        change = 1e-3 * most * torch.randn(images.shape, generator=generator).to(images.device)
        for _ in range(ATTACK_STEPS):
            change.requires_grad_()
            far = kd_divergence(logits(run(self.student, (images + change,))), scores)
            (slope,) = torch.autograd.grad(far, [change])
            change = (change.detach() + 2 * most / ATTACK_STEPS * slope.sign()).clamp(-most, most)
            change = (images + change).clamp(*self.pixels) - images
        self.student.train()
        return (images + change.detach()).clamp(*self.pixels)


def learn(learner: Learner, samples: Scored, steps: int, making: Making | None = None) -> None:
    """Steps of a student on samples, in an order of its own for each time round. making: counts them."""
    images, scores = samples
    making, size = making or Making(), min(learner.options.batch_size, len(images))
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, _order(len(images), learner.seed, learner.done)])
        chosen, order = order[:size].to(images.device), order[size:]
        if making.is_done():
            learner.done += 1
        else:
            making.add({"student": learner.step((images[chosen], scores[chosen]))})


def _order(count: int, seed: int, turn: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, "order", turn)))
