"""Loss and accuracy along the straight line between two models, and how much worse its middle is than its ends."""

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
    EndModel,
    Opened,
    common_tensors,
    load_end,
    module_of,
    open_aligned,
)
from mergekit_lfm.judge.questions import QUESTION_TASKS, Data, Question, batches_of, judge, questions_of
from mergekit_lfm.machine.progress import Count
from mergekit_lfm.runtime.batchnorm import reset_batchnorm as reset
from mergekit_lfm.runtime.load import Loaded
from mergekit_lfm.runtime.probe import difference, probe
from mergekit_lfm.runtime.subject import evaluation_mode

# How far the outputs of one module with the other's tensors may be from the other's. They differ by more if the modules
# compute different things, for example with different bases of rotary positions.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Point:
    """A model on the line, (1 - t) A + t B. loss: mean cross entropy in nats; accuracy: the share of right answers."""

    t: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Barrier:
    """The worst point t of the line, and how much worse it is than interpolation between the ends."""

    height: float
    t: float


@dataclass(frozen=True)
class Interpolation:
    """The points from A (t = 0) to B (t = 1), and the number of predictions that each was judged on.

    A prediction is that of one label, or of one token for a language model.
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
        """The barrier of these costs at the points; NaN counts as infinite."""
        known = [math.inf if math.isnan(cost) else cost for cost in costs]
        ends = known[0], known[-1]
        if math.inf in ends:  # no point is worse than such an end
            return Barrier(0.0, 0.0)
        times = [point.t for point in self.points]
        heights = [cost - (1 - t) * ends[0] - t * ends[1] for t, cost in zip(times, known, strict=True)]
        heights[0] = heights[-1] = 0.0
        worst = max(range(len(heights)), key=heights.__getitem__)
        return Barrier(heights[worst], times[worst])


def barrier(
    first: EndModel,
    second: EndModel,
    data: Data,
    *,
    task: str,
    points: int = 11,
    transform: Alignment | None = None,
    reset_batchnorm: Data | None = None,
    window: int | None = None,
    batch_size: int = 16,
    device: str = "cpu",
    progress: Count | None = None,
) -> Interpolation:
    """Losses and accuracies on data along the line from the first model to the second, rewritten by `transform`.

    Models are folders, loaded models, or modules that return logits: [n, classes], for task "lm" [n, tokens,
    vocabulary]. Parameters are interpolated, with the running statistics of BatchNorm; with `reset_batchnorm`, these
    are estimated anew on its data at the points between the ends. data: a file for `read_data`, or any input of
    `as_batches`. Every token of a text is predicted as in `evaluate.perplexity`, so that the losses at the ends are the
    logarithms of those perplexities. Batches for a language model are token ids [n, tokens]; it predicts all but the
    first. Two models are in memory at a time, and the first one's tensors once more; modules are restored afterwards.
    Raises PlanError if no line joins the two models, for data without labels, and for numbers out of range.
    """
    if task not in QUESTION_TASKS:
        raise PlanError(f"the task {task!r} has no barrier; expected {' or '.join(QUESTION_TASKS)}. Choose one")
    if points < 3:
        raise PlanError(f"points is {points}; expected at least 3, the ends and one between them. Give more")
    one = load_end(first, task, device)
    other = open_aligned(second, transform, one, task, device)
    ends = common_tensors(one, other)
    questions = questions_of(one, data, task, window=window, batch_size=batch_size)
    fresh = None
    if reset_batchnorm is not None:
        fresh = batches_of(one, reset_batchnorm, task, window=window, batch_size=batch_size)
    module, line = module_of(one), list[Point]()
    with evaluation_mode(module, module_of(other)), _move_and_restore(module, *ends) as move_to:
        move_to(1.0)
        _check_same(one, other, questions)
        for i in range(points):
            t = i / (points - 1)
            move_to(t)
            if fresh is not None and 0 < t < 1:
                reset(module, fresh)
            line.append(Point(t, *judge(module, questions)))
            if progress is not None:
                progress(i + 1, points)
    return Interpolation(tuple(line), sum(question.asked for question in questions))


@contextmanager
def _move_and_restore(
    module: nn.Module, tensors: Mapping[str, Tensor], end: Mapping[str, Tensor]
) -> Iterator[Callable[[float], None]]:
    """A function that sets the module's `tensors` to the point t of the line; restores them afterwards."""
    start = {name: x.clone() for name, x in tensors.items()}
    counts = {x: x.clone() for x in module.buffers() if not x.is_floating_point()}

    def move_to(t: float) -> None:
        with torch.no_grad():
            for name, x in tensors.items():
                exact = torch.promote_types(x.dtype, torch.float32)
                x.copy_(torch.lerp(start[name].to(exact), end[name].to(x.device, exact), t))  # t = 0, 1: bit for bit

    try:
        yield move_to
    finally:
        with torch.no_grad():
            for name, x in tensors.items():
                x.copy_(start[name])
            for x, before in counts.items():
                x.copy_(before)


def _check_same(first: Opened, second: Opened, questions: Sequence[Question]) -> None:
    """Raises PlanError if the first module, with the second's tensors, computes different outputs."""
    inputs = questions[0].batch
    if isinstance(first, Loaded) and first.task == "lm":  # the logits of long texts are large
        inputs = probe(first)
    apart = difference(second, first, inputs)
    if math.isfinite(apart) and apart > TOLERANCE:
        raise PlanError(
            f"with the tensors of the second model the first gives other outputs than the second (by {apart:.2g} of "
            "their spread), so they compute different things: compare their config.json, and give models whose "
            "configs agree"
        )
