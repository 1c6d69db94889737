"""`adapt`: a few steps of descent on the support set of a task, as a differentiable function of where they begin."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from mergekit_lfm.train.examples import Batch

Parameters = Mapping[str, Tensor]
Objective = Callable[[Parameters, Batch], Tensor]  # the mean loss of a batch, a scalar, at parameters
Change = Callable[[str, Tensor], Tensor]  # the slope of a parameter by its name, to what descends instead


def adapt(
    objective: Objective,
    start: Parameters,
    support: Batch,
    *,
    steps: int,
    rate: float | Parameters,
    first_order: bool = False,
    moves: Container[str] | None = None,
    change: Change | None = None,
) -> dict[str, Tensor]:
    """The parameters after so many steps theta <- theta - rate * slope of the objective on the support set.

    rate: one, or one for each number of each parameter. first_order: take the slopes for constants when the result is
    derived. moves: the names of parameters that change, all by default. change: of a slope before it is used.
    Source: Finn et al. 2017, arXiv 1703.03400, equation 1 and section 5.2 (first order); Raghu et al. 2020, arXiv
    1909.09157, equation 2 (moves: the head); Li et al. 2017, arXiv 1707.09835, equation 3 (a rate for each number).
    """
    fixed = {name: x for name, x in start.items() if moves is not None and name not in moves}
    moving = {name: x for name, x in start.items() if name not in fixed}
    slope_at = torch.func.grad(lambda found: objective({**fixed, **found}, support))
    for _ in range(steps):
        with torch.no_grad() if first_order else nullcontext():  # it ends no slope of torch.func's own
            slopes = slope_at(moving)
        if change is not None:
            slopes = {name: change(name, slope) for name, slope in slopes.items()}
        moving = {
            name: x - (rate if isinstance(rate, float) else rate[name]) * slopes[name] for name, x in moving.items()
        }
    return {**fixed, **moving}
