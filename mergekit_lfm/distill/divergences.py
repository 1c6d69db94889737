"""How far a student's scores are from a teacher's: one function, for students with and without data."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from mergekit_lfm.errors import PlanError, did_you_mean
from mergekit_lfm.train.losses import widen

Divergence = Literal["forward", "reverse", "js", "mae"]
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)


def kd_divergence(
    student_scores: Tensor, teacher_scores: Tensor, temperature: float = 1.0, kind: str = "forward"
) -> Tensor:
    """The divergence of two scores [..., classes] for each example, as one sum over all examples, a scalar.

    With p of the teacher and q of the student, both softmax(scores / T): "forward" is T^2 KL(p, q), "reverse" T^2
    KL(q, p), "js" T^2 times the Jensen-Shannon divergence (at most T^2 ln 2). "mae" is the mean absolute difference
    of the scores themselves, over the classes, and T has no part in it. The gradient of "forward" in the student's
    scores is T (q - p). Source: Hinton et al. 2015, arXiv 1503.02531, section 2; mae: Fang et al. 2019, arXiv
    1912.11006. Raises PlanError for another kind, a temperature that is not above 0, or other shapes.
    """
    _check(student_scores, teacher_scores, temperature, kind)
    student, teacher = widen(student_scores), widen(teacher_scores)
    if kind == "mae":
        return (student - teacher).abs().mean(-1).sum()
    q, p = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    if kind == "js":
        middle = torch.logaddexp(p, q) - math.log(2)
        total = (_relative(p, middle) + _relative(q, middle)) / 2
    else:
        total = _relative(p, q) if kind == "forward" else _relative(q, p)
    return temperature**2 * total


def _relative(p: Tensor, q: Tensor) -> Tensor:
    """KL(p, q) by the logarithms of both, summed over the examples. A class of probability 0 in p has no part."""
    return torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)


def _check(student: Tensor, teacher: Tensor, temperature: float, kind: str) -> None:
    if kind not in DIVERGENCES:
        cure = did_you_mean(kind, DIVERGENCES)
        raise PlanError(f"found the divergence {kind!r}; expected {', '.join(DIVERGENCES)}; {cure}")
    if not 0 < temperature < math.inf:
        raise PlanError(f"temperature is {temperature}; expected a number above 0. Choose another, such as 2")
    if student.shape != teacher.shape:
        raise PlanError(
            f"the student's scores are {list(student.shape)} and the teacher's {list(teacher.shape)}; expected the "
            "same shape. Give models of the same classes"
        )
