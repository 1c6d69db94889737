"""Black boxes: no gradient passes, calls are counted; and slopes from values alone, against true ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mergekit_lfm.meta import black_box
from mergekit_lfm.meta.black_box import BlackBox, zero_order_gradient


def test_a_black_box_gives_probabilities_without_a_gradient_and_counts() -> None:
    torch.manual_seed(0)
    net, calls = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.zeros(2, dtype=torch.long)
    boxes = [BlackBox(net, calls), BlackBox(net, calls)]
    images = torch.rand(600, 1, 2, 2, requires_grad=True)
    scores = boxes[0].scores(images)
    assert not scores.requires_grad and scores.grad_fn is None
    torch.testing.assert_close(scores.sum(-1), torch.ones(600))
    boxes[1].scores(images[:5])
    assert calls.tolist() == [605, 3]  # 600 images are two requests of up to 512
    assert images.grad is None and all(x.grad is None for x in net.parameters())


def cubic(x: Tensor) -> Tensor:
    """A smooth loss of each image, [n]."""
    flat = x.flatten(1)
    return (flat**3).sum(-1) + flat[:, 0] * flat[:, -1]


def test_all_directions_give_the_true_slope_and_some_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(3, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    (true,) = torch.autograd.grad(cubic(x).sum(), x)
    x = x.detach()
    asked, generator = list[int](), torch.Generator().manual_seed(1)

    def ask(images: Tensor) -> Tensor:
        asked.append(len(images))
        return images

    def slope(directions: int) -> Tensor:
        return zero_order_gradient(ask, cubic, x, cubic(x), directions, 1e-6, generator)

    torch.testing.assert_close(slope(99), true, rtol=0, atol=1e-5)
    with monkeypatch.context() as patched:
        patched.setattr(black_box, "ASKED_AT_ONCE", 5)
        torch.testing.assert_close(slope(99), true, rtol=0, atol=1e-5)
    assert asked == [18, 5, 5, 5, 3]  # three images in six directions, at once and in parts
    drawn = torch.stack([slope(2) for _ in range(2000)])
    error = drawn.std(0) / 2000**0.5
    assert bool(((drawn.mean(0) - true).abs() < 4.5 * error + 1e-4).all())
    assert bool(((drawn * true).flatten(2).sum(-1) > -1e-6).all())  # each is a projection: never uphill
