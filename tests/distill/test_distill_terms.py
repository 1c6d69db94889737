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
from mergekit_lfm.distill.metadata import collect_records
from mergekit_lfm.distill.passes import Moments, Observer, Pass, batch_norms, frozen, moments_of
from mergekit_lfm.errors import PlanError

CHECKERS = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(4, 4)[None, None]


def value(name: str, images: Tensor | None = None, scores: Tensor | None = None, **facts: Any) -> float:
    x = torch.zeros(1, *SHAPE) if images is None else images
    return float(TERMS[name](Pass(x, torch.zeros(len(x), 4) if scores is None else scores, **facts)))


def test_total_variation_and_l2_of_a_checkerboard() -> None:
    assert value("total_variation", CHECKERS) == 2.0
    assert value("total_variation", torch.ones(3, *SHAPE)) == 0.0
    assert value("l2", CHECKERS) == 0.5


def test_bn_vanishes_at_the_stored_statistics() -> None:
    net, images = small(), some_images(32, 3)
    (norm,) = batch_norms(net)
    found = moments_of(net.conv(images), whole=False)
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


def test_balance_is_the_entropy_of_the_mean_prediction() -> None:
    sure = 50 * torch.eye(4)
    assert value("balance", torch.zeros(4, *SHAPE), sure) == pytest.approx(-math.log(4))
    assert value("certainty", torch.zeros(4, *SHAPE), sure) == pytest.approx(0, abs=1e-6)
    half = sure[torch.tensor([0, 0, 1, 1])]
    assert value("balance", torch.zeros(4, *SHAPE), half) == pytest.approx(-math.log(2))
    assert value("certainty", torch.zeros(4, *SHAPE)) == pytest.approx(math.log(4))


def test_diversity_is_the_change_of_predictions_for_one_of_images() -> None:
    images = torch.cat([torch.zeros(2, *SHAPE), torch.full((2, *SHAPE), 0.5)])
    scores = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 0], [90, 0, 0, 0], [0, 90, 0, 0]])
    wanted = math.sqrt(2 * (0.75**2 + 3 * 0.25**2)) / math.sqrt(2 * 64 * 0.25)
    assert value("diversity", images, scores) == pytest.approx(wanted)


def test_spread_and_boundary_by_hand() -> None:
    images, latents = torch.stack([torch.zeros(SHAPE), torch.ones(SHAPE)]), torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert value("spread", images, latents=latents) == pytest.approx(math.exp(-5 / 2))  # two pairs of four are apart
    scores = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 3.0, 0, 0]])
    targets = torch.tensor([0, 1, 1])  # pairs: 0 with 2, and 1 with 0; 2 and 1 are of one class
    assert value("boundary", torch.zeros(3, *SHAPE), scores, targets=targets) == pytest.approx((10 / 4 + 2 / 4) / 2)


def test_contrast_is_least_for_copies_alike_and_others_far() -> None:
    own = torch.eye(3)
    near = value("contrast", torch.zeros(3, *SHAPE), views=(own, 2 * own, torch.empty(0, 3)))
    assert near == pytest.approx(math.log(1 + 2 * math.exp(-10)), rel=1e-2)  # cosines 1 and 0, by a temperature of 0.1
    same = value("contrast", torch.zeros(3, *SHAPE), views=(own, own, own))
    assert same == pytest.approx(math.log(2 + 4 * math.exp(-10)))  # an earlier image that is just as near


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
    found = moments_of(x)
    torch.testing.assert_close(found, Moments(rows.mean(0), torch.cov(rows.T, correction=0)))


def test_terms_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PlanError, match="did you mean one_hot"):
        check_terms({"onehot": 1.0})
    with pytest.raises(PlanError, match="found no term"):
        check_terms({})
    with pytest.raises(PlanError, match="reads student of a pass"):
        value("adversarial_kl")
