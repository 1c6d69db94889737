"""Loss and accuracy along the straight line between two models, and by how much its middle is worse than its ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergekit_lfm.errors import PlanError
from mergekit_lfm.judge.ends import (
    Alignment,
    Model,
    Opened,
    Progress,
    common_tensors,
    module_of,
    open_aligned,
    open_model,
)
from mergekit_lfm.judge.questions import TASKS, Data, Question, batches_of, judge, questions_of
from mergekit_lfm.runtime.batchnorm import reset_batchnorm as reset
from mergekit_lfm.runtime.load import Loaded
from mergekit_lfm.runtime.probe import difference, probe
from mergekit_lfm.runtime.subject import evaluating

# How far the outputs of one module with the other's tensors may be from the other's: they differ by more where the two
# compute something else, with another base of rotary positions for one.
SAME = 1e-3


@dataclass(frozen=True)
class Point:
    """A model on the line, (1 - t) A + t B. loss: mean cross entropy in nats; accuracy: the share that is right."""

    t: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Barrier:
    """By how much a point of the line is worse than the ends would have it, at the worst point, and where that is."""

    height: float
    t: float


@dataclass(frozen=True)
class Line:
    """The points from A (t = 0) to B (t = 1), and on how many predictions each was judged.

    A prediction is one of a label, or for a language model of a token.
    """

    points: tuple[Point, ...]
    predictions: int

    @property
    def loss_barrier(self) -> Barrier:
        """max over t of L(t) - [(1 - t) L(0) + t L(1)], nats. Source: Entezari et al. 2022 (arXiv 2110.06296), the
        definition of the loss barrier; Frankle et al. 2020 (arXiv 1912.05671) take the mean of the ends instead."""
        return self._barrier([point.loss for point in self.points])

    @property
    def accuracy_barrier(self) -> Barrier:
        """max over t of [(1 - t) acc(0) + t acc(1)] - acc(t), a fraction."""
        return self._barrier([-point.accuracy for point in self.points])

    def _barrier(self, costs: Sequence[float]) -> Barrier:
        """Of costs at the points; what is no number counts as infinite."""
        known = [math.inf if math.isnan(cost) else cost for cost in costs]
        ends = known[0], known[-1]
        if math.inf in ends:  # nothing is worse than such an end
            return Barrier(0.0, 0.0)
        times = [point.t for point in self.points]
        heights = [cost - (1 - t) * ends[0] - t * ends[1] for t, cost in zip(times, known, strict=True)]
        heights[0] = heights[-1] = 0.0
        worst = max(range(len(heights)), key=heights.__getitem__)
        return Barrier(heights[worst], times[worst])


def barrier(
    first: Model,
    second: Model,
    data: Data,
    *,
    task: str,
    points: int = 11,
    transform: Alignment | None = None,
    reset_batchnorm: Data | None = None,
    window: int | None = None,
    batch_size: int = 16,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Line:
    """The line from the first model to the second, which a transform rewrites before: losses and accuracies on data.

    Models are folders, or what is loaded, or modules that return logits: [n, classes], for task "lm" [n, tokens,
    vocabulary]. Parameters are interpolated, and the running statistics of BatchNorm with them; given data to reset
    them by, these are re-estimated at the points between the ends. data: a file for `read_data`, or what `as_batches`
    takes; of a text every token is predicted as `evaluate.perplexity` does it, so that the losses at the ends are the
    logarithms of those perplexities. Batches of a language model are token ids [n, tokens], of which each
    but the first is predicted. Two models are in memory at a time, and the first one's tensors once more; a module that
    is given is as it was afterwards. Raises PlanError where there is no line between the two, for data without labels,
    and for numbers out of range.
    """
    if task not in TASKS:
        raise PlanError(f"there is no barrier for the task {task!r}; expected {' or '.join(TASKS)}. Choose one of them")
    if points < 3:
        raise PlanError(f"points is {points}; expected at least 3, the ends and one between them. Give more")
    one = open_model(first, task, device)
    other = open_aligned(second, transform, one, task, device)
    ends = common_tensors(one, other)
    questions = questions_of(one, data, task, window=window, batch_size=batch_size)
    fresh = None
    if reset_batchnorm is not None:
        fresh = batches_of(one, reset_batchnorm, task, window=window, batch_size=batch_size)
    module, found = module_of(one), list[Point]()
    with evaluating(module, module_of(other)), _moving(module, *ends) as move_to:
        move_to(1.0)
        _check_same(one, other, questions)
        for i in range(points):
            t = i / (points - 1)
            move_to(t)
            if fresh is not None and 0 < t < 1:
                reset(module, fresh)
            found.append(Point(t, *judge(module, questions)))
            if progress is not None:
                progress(i + 1, points)
    return Line(tuple(found), sum(question.asked for question in questions))


@contextmanager
def _moving(
    module: nn.Module, held: Mapping[str, Tensor], end: Mapping[str, Tensor]
) -> Iterator[Callable[[float], None]]:
    """What puts the point t of the line in place of the module's tensors `held`; afterwards they are as they were."""
    start = {name: x.clone() for name, x in held.items()}
    counts = {x: x.clone() for x in module.buffers() if not x.is_floating_point()}

    def move_to(t: float) -> None:
        with torch.no_grad():
            for name, x in held.items():
                exact = torch.promote_types(x.dtype, torch.float32)
                x.copy_(torch.lerp(start[name].to(exact), end[name].to(x.device, exact), t))  # t = 0, 1: bit for bit

    try:
        yield move_to
    finally:
        with torch.no_grad():
            for name, x in held.items():
                x.copy_(start[name])
            for x, before in counts.items():
                x.copy_(before)


def _check_same(first: Opened, second: Opened, questions: Sequence[Question]) -> None:
    """PlanError where the first module, which holds the second's tensors, is another function of them."""
    inputs = questions[0].batch
    if isinstance(first, Loaded) and first.task == "lm":  # the logits of long texts are large
        inputs = probe(first)
    apart = difference(second, first, inputs)
    if math.isfinite(apart) and apart > SAME:
        raise PlanError(
            f"with the tensors of the second model the first gives other outputs than the second (by {apart:.2g} of "
            "their spread), so they compute different things: compare their config.json, and give models whose "
            "configs agree"
        )
