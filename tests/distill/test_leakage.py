"""The leakage audit: a picture is read from the change of one step, by a net with smooth activations."""

from __future__ import annotations

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mergekit_lfm.distill.generators import build
from mergekit_lfm.distill.invert import Inversion
from mergekit_lfm.distill.leakage import as_gradient, audit, correlation, read_labels
from mergekit_lfm.errors import PlanError

SHAPE = (1, 8, 8)


class Smooth(nn.Module):
    """Two convolutions with sigmoids, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 12, 5, padding=2, stride=2), nn.Conv2d(12, 12, 5, padding=2)
        self.head = nn.Linear(12 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x).sigmoid()).sigmoid().flatten(1))
        return out


def tuned_on(net: nn.Module, images: Tensor, labels: Tensor, rate: float) -> nn.Module:
    """The net after a step of plain descent."""
    after = copy.deepcopy(net)
    nn.functional.cross_entropy(after(images), labels).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for x in after.parameters():
            x.sub_(rate * (torch.zeros_like(x) if x.grad is None else x.grad))
    return after


@pytest.mark.parametrize("way", ["deep_leakage", "inverting_gradients", "gradinversion"])
def test_a_digit_is_read_from_the_change_of_one_step(way: str) -> None:
    digits = load_digits()
    image = torch.tensor(digits.images[3], dtype=torch.float32)[None, None] / 16
    label = torch.tensor([int(digits.target[3])])
    net = build(Smooth, 0)
    gradient = as_gradient(net, tuned_on(net, image, label, 0.5), 0.5)
    leak = audit(net, gradient, SHAPE, way=way, groups=2, options=Inversion(steps=120))  # type: ignore[arg-type]
    assert leak.labels.tolist() == label.tolist()
    assert correlation(leak.samples.images, image) > 0.9
    assert leak.match > 0.99


def test_labels_of_several_examples_are_the_least_slopes() -> None:
    net = build(Smooth, 0)
    labels = torch.tensor([1, 4, 7])
    images = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    gradient = as_gradient(net, tuned_on(net, images, labels, 0.1), 0.1)
    assert sorted(read_labels(net, gradient, 3).tolist()) == [1, 4, 7]


def test_gradients_of_other_models_are_refused() -> None:
    net = build(Smooth, 0)
    for gradient, words in (
        ({"first.weight": torch.zeros(3)}, "first.weight: found"),
        ({"third": torch.zeros(3)}, "no such parameter"),
        ({}, "it is empty"),
    ):
        with pytest.raises(PlanError, match=words):
            audit(net, gradient, SHAPE)
    with pytest.raises(PlanError, match="for 1 images; expected one for each"):
        audit(net, dict(net.named_parameters()), SHAPE, labels=torch.tensor([1, 2]))
    with pytest.raises(PlanError, match="Give the labels"):
        audit(net, {"first.weight": torch.zeros(12, 1, 5, 5)}, SHAPE)
    with pytest.raises(PlanError, match="did you mean deep_leakage"):
        audit(net, {}, SHAPE, way="deepleakage")  # type: ignore[arg-type]
