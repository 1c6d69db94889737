"""Terms of images' losses, by hand: where they vanish, and what they are on images of a few pixels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers_distill import SHAPE, small, some_images
from torch import Tensor, nn

from mergekit_lfm.distill.image_terms import TERMS, check_terms
from mergekit_lfm.distill.impressions import class_similarity, concentrations, draw_impressions
from mergekit_lfm.distill.metadata import collect_records, find_clusters
from mergekit_lfm.distill.passes import Moments, Observer, Pass, frozen, moments_of
from mergekit_lfm.errors import PlanError
from mergekit_lfm.runtime.batchnorm import batchnorms

CHECKERS = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(4, 4)[None, None]


LN3 = [math.log(3), 0.0, 0.0, 0.0]  # of probabilities 1/2, 1/6, 1/6 and 1/6
SURE = 50 * torch.eye(4)


def seen(images: Tensor | None = None, scores: Any = None, **facts: Any) -> Pass:
    """A pass of blank images and equal scores, and of lists as tensors."""
    y = torch.zeros(1 if images is None else len(images), 4) if scores is None else torch.as_tensor(scores)
    known: dict[str, Any] = {name: torch.tensor(x) if isinstance(x, list) else x for name, x in facts.items()}
    return Pass(torch.zeros(len(y), *SHAPE) if images is None else images, y, **known)


def value(name: str, made: Pass) -> float:
    return float(TERMS[name](made))


def pair(mean: float, spread: Tensor) -> Moments:
    return Moments(torch.tensor([3.0 * mean, 4.0 * mean]), spread)


# At temperature 3: probabilities r : 1 : 1 : 1 against equal ones.
R = 3 ** (1 / 3)
P, Q = [R / (R + 3)] + 3 * [1 / (R + 3)], 4 * [0.25]
MIDDLE = [(p + q) / 2 for p, q in zip(P, Q, strict=True)]
JENSEN = sum(x * math.log(x / m) for y in (P, Q) for x, m in zip(y, MIDDLE, strict=True)) / 2
HALVES = torch.cat([torch.zeros(2, *SHAPE), torch.full((2, *SHAPE), 0.5)])
BLACK_AND_WHITE = torch.stack([torch.zeros(SHAPE), torch.ones(SHAPE)])

CASES = [
    ("bn", seen(norms=((pair(0, torch.ones(2)), pair(1, torch.zeros(2))),)), 5 + 2**0.5),
    ("records", seen(moments=((pair(0, torch.ones(2, 2)), pair(1, torch.zeros(2, 2))),)), 5 + 2),
    ("one_hot", seen(scores=[LN3], targets=[1]), math.log(6)),
    ("one_hot", seen(scores=[LN3]), math.log(2)),
    ("impressions", seen(scores=[LN3], targets=[[0.5, 0.5, 0.0, 0.0]]), (math.log(2) + math.log(6)) / 2),
    ("activation", seen(features=[[1.0, -3.0]]), -2.0),
    ("balance", seen(scores=SURE), -math.log(4)),
    ("balance", seen(scores=SURE[[0, 0, 1, 1]]), -math.log(2)),
    ("certainty", seen(scores=SURE), 0.0),
    ("certainty", seen(), math.log(4)),
    ("adversarial_kl", seen(scores=[LN3, LN3], student=2 * [4 * [0.0]]), -(math.log(2) / 2 + math.log(2 / 3) / 2)),
    ("adversarial_mae", seen(student=[[1.0, -2.0, 0.0, 5.0]]), -2.0),
    ("competition", seen(scores=[LN3, LN3], student=2 * [4 * [0.0]]), 1 - JENSEN),
    ("total_variation", seen(CHECKERS), 2.0),
    ("total_variation", seen(torch.ones(3, *SHAPE)), 0.0),
    ("l2", seen(CHECKERS), 0.5),
    ("clusters", seen(features=[[1.0, 3.0]], aims=[[0.0, 1.0]]), 2.5),
    (
        "diversity",
        seen(HALVES, [4 * [0.0], 4 * [0.0], [90.0, 0, 0, 0], [0, 90.0, 0, 0]]),
        math.sqrt(2 * (0.75**2 + 3 * 0.25**2)) / math.sqrt(2 * 64 * 0.25),
    ),
    # Two pairs of four are apart: by 5 between latent numbers, by 1 between images.
    ("spread", seen(BLACK_AND_WHITE, latents=[[0.0, 0.0], [3.0, 4.0]]), math.exp(-5 / 2)),
    ("decoder", seen(decoded=[[1.0, 2.0]], latents=[[0.0, 0.0]]), 2.5),
    ("proxy", seen(judged=[0.0, -math.log(3)]), (math.log(2) + math.log(4)) / 2),
    # Cosines 1 and 0 by a temperature of 0.1; then also an earlier image that is just as near.
    ("contrast", seen(views=(torch.eye(3), 2 * torch.eye(3), torch.empty(0, 3))), math.log(1 + 2 * math.exp(-10))),
    ("contrast", seen(views=(torch.eye(3),) * 3), math.log(2 + 4 * math.exp(-10))),
    # Pairs: 0 with 2, and 1 with 0; 2 and 1 are of one class.
    (
        "boundary",
        seen(scores=[[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 3.0, 0, 0]], targets=[0, 1, 1]),
        (10 / 4 + 2 / 4) / 2,
    ),
    ("gradient", seen(gradients=(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0]))), 1 - 0.5**0.5),
    ("gradient_l2", seen(gradients=(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0]))), 2.0),
    ("group", seen(BLACK_AND_WHITE, groups=2), 0.25),
]


@pytest.mark.parametrize(("name", "made", "wanted"), CASES, ids=[name for name, _, _ in CASES])
def test_a_term_has_its_value_by_hand(name: str, made: Pass, wanted: float) -> None:
    assert value(name, made) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_each_term_has_a_value_by_hand() -> None:
    assert {name for name, _, _ in CASES} == TERMS.keys()


def test_bn_vanishes_at_the_stored_statistics() -> None:
    net, images = small(), some_images(32, 3)
    (norm,) = batchnorms(net).values()
    found = moments_of(net.conv(images), axis=1, whole=False)
    norm.running_mean, norm.running_var = found.mean.detach().clone(), found.spread.detach().clone()
    with frozen([net]):
        observer = Observer(net, frozenset(["bn"]))
        assert float(TERMS["bn"](observer.see(images))) < 1e-5
        assert float(TERMS["bn"](observer.see(images + 0.1 * CHECKERS))) > 1e-2


def test_records_vanish_on_the_recorded_images() -> None:
    net, images = small(norm=False), some_images(32, 3)
    records = collect_records(net, images)
    assert [*records] == ["hidden", "head"]  # the convolution reads the images themselves
    rows = nn.functional.max_pool2d(net.act(net.conv(images)), 2).flatten(1).detach()
    torch.testing.assert_close(records["hidden"].spread, torch.cov(rows.T, correction=0))
    observer = Observer(net, frozenset(["records"]), records=records)
    with frozen([net]):
        assert float(TERMS["records"](observer.see(images))) < 1e-5
        assert float(TERMS["records"](observer.see(1 - images))) > 1e-3


def test_gradient_terms_vanish_at_the_true_image() -> None:
    net, images, targets = small(), some_images(1, 4), torch.tensor([2])
    nn.functional.cross_entropy(net(images), targets).backward()  # type: ignore[no-untyped-call]
    wanted = {name: x.grad.clone() for name, x in net.named_parameters() if x.grad is not None}
    observer = Observer(net, frozenset(), gradient=wanted)
    for name in ("gradient", "gradient_l2"):
        assert float(TERMS[name](observer.see(images, targets=targets)).detach()) == pytest.approx(0, abs=1e-6)
    assert float(TERMS["gradient"](observer.see(1 - images, targets=targets)).detach()) > 1e-2


def test_class_similarity_by_hand() -> None:
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    root = 0.5**0.5
    wanted = torch.tensor([[1, root, -1], [root, 1, -root], [-1, -root, 1]])
    torch.testing.assert_close(class_similarity(weight), wanted)
    rows = torch.tensor([[1, (root + 1) / 2, 0.01], [2 * root / (1 + root), 1, 0.01], [0.01, (1 - root) / 2, 1]])
    torch.testing.assert_close(concentrations(weight), rows)
    drawn = draw_impressions(weight, 6000, seed=0)
    torch.testing.assert_close(drawn.sum(-1), torch.ones(6000))
    mean = drawn[0::3].mean(0)  # of a Dirichlet: its concentrations, over their sum
    torch.testing.assert_close(mean, rows[0] / rows[0].sum(), atol=0.03, rtol=0)
    assert torch.equal(drawn, draw_impressions(weight, 6000, seed=0))


def test_moments_take_the_places_of_images_as_rows() -> None:
    x = some_images(5).reshape(5, 2, 4, 8)
    rows = x.permute(0, 2, 3, 1).reshape(-1, 2)
    found = moments_of(x, axis=1)
    torch.testing.assert_close(found, Moments(rows.mean(0), torch.cov(rows.T, correction=0)))


def test_the_axis_of_channels_is_the_layers() -> None:
    """BatchNorm1d reads [n, d] or [n, d, length], a linear layer [..., d]."""
    norm, x = nn.BatchNorm1d(2, momentum=1.0), torch.arange(12.0).reshape(2, 2, 3)
    norm(x)
    rows = torch.tensor([[0.0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]])

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = norm, nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.norm(x).flatten(1))
            return out

    net = Line().eval()
    ((found, stored),) = Observer(net, frozenset(["bn"])).see(x).norms
    torch.testing.assert_close(found, Moments(rows.mean(1), rows.var(1, correction=0)))
    torch.testing.assert_close(stored.mean, rows.mean(1))
    torch.testing.assert_close(moments_of(x, axis=-1).mean, x.mean((0, 1)))


def test_records_and_clusters_do_not_depend_on_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = small(), some_images(20, 5)
    monkeypatch.setattr("mergekit_lfm.distill.metadata.PART", 100)
    whole, clusters = collect_records(net, images), find_clusters(net, images)
    monkeypatch.setattr("mergekit_lfm.distill.metadata.PART", 7)
    torch.testing.assert_close(collect_records(net, images), whole)
    torch.testing.assert_close(find_clusters(net, images).centres, clusters.centres)


def test_terms_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PlanError, match="did you mean one_hot"):
        check_terms({"onehot": 1.0})
    with pytest.raises(PlanError, match="found no term"):
        check_terms({})
    with pytest.raises(PlanError, match="reads student of a pass"):
        value("adversarial_kl", seen())
