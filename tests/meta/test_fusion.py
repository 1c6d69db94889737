"""DRO: the worst embeddings in a Wasserstein ball, by hand and by optimal transport; the fit of the teachers."""

from __future__ import annotations

import ot
import torch

from mergekit_lfm.meta.fusion import Fusion, Moves, RobustFit, into_ball, nominal, worst_moves
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.train.loop import fit


def test_the_worst_moves_are_those_of_the_closed_form_and_stay_in_the_ball() -> None:
    """Of squared distances |e_i + d_i - t_i|^2 the worst mean in the ball is (the root of their mean + radius)^2."""
    torch.manual_seed(0)
    centre, targets, radius = torch.randn(5, 3).double(), torch.randn(5, 3).double(), 0.7

    def loss(moves: torch.Tensor) -> torch.Tensor:
        return (centre + moves - targets).square().sum(-1).mean()

    moves = worst_moves(loss, torch.randn(5, 3).double(), radius, steps=40)
    closed = (loss(torch.zeros(5, 3)).sqrt() + radius) ** 2
    torch.testing.assert_close(loss(moves), closed, rtol=1e-5, atol=0)
    costs = ot.dist(centre.numpy(), (centre + moves).numpy())
    even = [0.2] * 5
    assert float(ot.emd2(even, even, costs)) ** 0.5 <= radius + 1e-9
    small = torch.full((5, 3), 0.1)
    torch.testing.assert_close(into_ball(small, 1.0), small)
    assert not worst_moves(loss, torch.randn(5, 3).double(), 0.0).any()


def test_the_loss_is_the_mean_square_at_the_worst_embeddings() -> None:
    """With a linear map the loss has a closed form; without a ball it is the plain mean square."""
    torch.manual_seed(1)
    model, targets = Fusion(4, 6, width=8, hidden=8), torch.randn(4, 6)
    plain = (model(model.tasks) - targets).square().mean()
    batch = Moves(4).batch([0])
    terms = RobustFit(targets, 0.0)(model, batch)
    torch.testing.assert_close(terms.total, plain)
    assert terms.number == 1 and RobustFit(targets, 0.5)(model, batch).total > plain


def test_teachers_are_fitted_and_a_large_ball_leaves_their_mean() -> None:
    torch.manual_seed(2)
    targets = torch.randn(4, 30)
    targets -= targets.mean(0)
    options = Options(steps=80, batch_size=1, learning_rate=2e-2, schedule="cosine", clip=0.0)
    losses = list[float]()
    for radius in (0.0, 2.0):
        torch.manual_seed(3)
        model = Fusion(4, 30)
        losses.append(fit(model, Moves(4), RobustFit(targets, radius), options).loss)
    assert losses[0] < 0.01 < 0.5 < losses[1]  # one learns them, the other knows no task by its embedding
    assert float(nominal(model).square().mean().sqrt()) < 0.2
