"""Divergences of scores: gradients against closed forms, values against sums of torch in float64."""

from __future__ import annotations

import math

import pytest
import torch

from mergekit_lfm.distill.divergences import DIVERGENCES, kd_divergence
from mergekit_lfm.errors import PlanError


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_forward_has_the_closed_forms_gradient(temperature: float) -> None:
    torch.manual_seed(0)
    student = torch.randn(5, 3, 7, dtype=torch.float64, requires_grad=True)
    teacher = 3 * torch.randn(5, 3, 7, dtype=torch.float64)
    kd_divergence(student, teacher, temperature).backward()  # type: ignore[no-untyped-call]
    wanted = temperature * ((student.detach() / temperature).softmax(-1) - (teacher / temperature).softmax(-1))
    torch.testing.assert_close(student.grad, wanted, rtol=0, atol=1e-12)


def test_values_by_hand() -> None:
    torch.manual_seed(1)
    student, teacher, t = (*torch.randn(2, 4, 6, dtype=torch.float64), 2.0)
    q, p = (student / t).softmax(-1), (teacher / t).softmax(-1)
    middle = (p + q) / 2

    def relative(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum()

    wanted = {
        "forward": t * t * relative(p, q),
        "reverse": t * t * relative(q, p),
        "js": t * t * (relative(p, middle) + relative(q, middle)) / 2,
        "mae": (student - teacher).abs().sum() / 6,
    }
    for kind in DIVERGENCES:
        torch.testing.assert_close(kd_divergence(student, teacher, t, kind), wanted[kind])
        assert float(kd_divergence(teacher, teacher, t, kind)) == pytest.approx(0, abs=1e-12)
    far = torch.tensor([[200.0, 0]]), torch.tensor([[0, 200.0]])
    assert float(kd_divergence(*far, 1.0, "js")) == pytest.approx(math.log(2))


def test_wrong_arguments_are_refused() -> None:
    x = torch.zeros(2, 3)
    for arguments, words in (
        ((x, x, 1.0, "forwards"), "did you mean forward"),
        ((x, x, 0.0), "temperature is 0"),
        ((x, x[:, :2]), r"\[2, 3\] and the teacher's \[2, 2\]"),
    ):
        with pytest.raises(PlanError, match=words):
            kd_divergence(*arguments)
