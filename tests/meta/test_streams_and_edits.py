"""Algorithms whose tasks are a stream, edits, or shared out to groups, against steps by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_adapt import EPISODES, Named, adapted_by_hand, loss_by_hand, slopes_of, small, tasks_of
from test_episodes import numbered
from torch import Tensor, nn

from mergekit_lfm.errors import PlanError
from mergekit_lfm.meta.algorithms import build_loss
from mergekit_lfm.meta.edits import Edits, margins
from mergekit_lfm.meta.episodes import sides
from mergekit_lfm.meta.groups import EPOCH, FIRST, Momentum
from mergekit_lfm.meta.losses import Inner, MetaLoss, over_tasks
from mergekit_lfm.meta.stream import Stream
from mergekit_lfm.recipe.meta_algorithms import ALGORITHMS
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.train.examples import IGNORED, Batch, Examples, join
from mergekit_lfm.train.loop import fit
from mergekit_lfm.train.losses import LOSSES

PLAIN: dict[str, Any] = {"optimizer": "sgd", "schedule": "constant", "clip": 0.0}


def test_groups_go_through_their_tasks_and_the_start_goes_part_of_the_way_to_their_mean() -> None:
    model = Named(small())
    start = {name: x.detach().clone() for name, x in model.named_parameters()}
    settings = {"group_count": 2, "group_rate": 0.3}
    loss = build_loss(model, "classification", ALGORITHMS["mgml"], Inner(2, 0.1), settings=settings)
    tasks, ends = tasks_of(EPISODES.batch([0, 1, 2, 3])), []
    fit(model, EPISODES, loss, Options(steps=1, batch_size=4, learning_rate=1.0, **PLAIN))
    for group in (tasks[:2], tasks[2:]):
        now = start
        for support, query in group:
            adapted = adapted_by_hand(now, support, 2, 0.1)
            slopes = torch.autograd.grad(loss_by_hand(adapted, query), [*adapted.values()])
            now = {name: (x - 0.3 * g).detach() for (name, x), g in zip(now.items(), slopes, strict=True)}
        ends.append(now)
    for name, x in start.items():
        wanted = FIRST * x + (1 - FIRST) * (ends[0][name] + ends[1][name]) / 2
        torch.testing.assert_close(model.get_parameter(name).detach(), wanted, rtol=1e-6, atol=1e-8)


def test_the_momentum_of_groups_follows_the_loss_of_three_epochs() -> None:
    momentum, shares = Momentum(), list[float]()
    for epoch_loss in (3.0, 2.0, 1.8, 1.7):
        for _ in range(EPOCH):
            shares.append(momentum.share(torch.tensor(epoch_loss)))
    assert shares[: 3 * EPOCH] == pytest.approx([1 - FIRST] * 3 * EPOCH)
    ratio = (1.8 - 2.0) / (2.0 - 3.0)
    assert shares[-1] == pytest.approx(1 - (1 - 1 / (1 + math.exp(-(ratio - 1)))) * 3 / 17, abs=1e-5)


def of_sign(count: int, sign: float) -> Examples:
    """Examples of two classes; the sign of the first of their numbers tells which."""
    torch.manual_seed(int(sign) + 5)
    x = torch.randn(count, 4).double()
    return Examples([{"x": row, "labels": (sign * row[0] > 0).long()} for row in x])


def test_a_stream_stays_with_a_task_and_draws_new_examples_of_it() -> None:
    stream = Stream(numbered(9, 12), 3, 2, 4, seed=1, stay=0.8)
    tasks = [stream.task_of(number) for number in range(200)]
    assert all(now in (before, number) for number, (before, now) in enumerate(pairwise(tasks), 1))
    assert 20 < len({*tasks}) < 60  # 41 of 200 are expected
    same = next(number for number in range(200) if tasks[number] == tasks[number + 1])
    whole = stream.batch([same, same + 1])
    assert torch.equal(*whole["classes"]) and not torch.equal(*whole["support/x"])
    never = Stream(numbered(9, 12), 3, 2, 4, seed=1, stay=0.0)
    assert [never.task_of(number) for number in range(20)] == [*range(20)]


def test_fast_weights_follow_the_stream_and_begin_anew_when_the_task_changes() -> None:
    """The changes that are seen are those that there are, and what is met is judged before it is learned."""
    model = Named(small(2))
    data = join([of_sign(60, 1.0), of_sign(60, -1.0)], [None, None])
    row, stream = ALGORITHMS["continual"], Stream(data, None, 20, 20, seed=2, stay=0.7)
    loss = build_loss(model, "classification", row, Inner(20, 2.0), settings={"threshold": 2.0})
    start = {name: x.detach().clone() for name, x in model.named_parameters() if name.startswith("inner")}
    history = fit(model, stream, loss, Options(steps=24, batch_size=1, learning_rate=1e-9, **PLAIN))
    places = [int(stream.batch([number])["classes"]) for number in range(24)]
    changes = sum(a != b for a, b in pairwise(places))
    assert loss.facts()["changes"] == changes > 2
    now = start
    for number, line in enumerate(history.record):
        ((support, _),) = tasks_of(stream.batch([number]))
        assert line["loss"] == pytest.approx(loss_by_hand(now, support).item(), rel=1e-4, abs=1e-6)
        changed = number and places[number] != places[number - 1]
        now = adapted_by_hand(start if changed else now, support, 20, 2.0)
    assert loss.facts()["met"] == pytest.approx(sum(line["loss"] for line in history.record) / 24)


def test_slow_weights_descend_on_the_loss_after_adapting_the_more_the_less_is_known() -> None:
    model, batch = Named(small()), EPISODES.batch([0, 1])
    start = {name: x.detach().clone() for name, x in model.named_parameters()}
    settings = {"smoothing": 0.7}
    loss = build_loss(model, "classification", ALGORITHMS["continual"], Inner(2, 0.1), settings=settings)
    slopes, wanted = slopes_of(loss, model, batch), {name: torch.zeros_like(x) for name, x in start.items()}
    for support, query in tasks_of(batch):
        end = adapted_by_hand(start, support, 2, 0.1)
        value = loss_by_hand(end, query)
        for name, slope in zip(end, torch.autograd.grad(value, [*end.values()]), strict=True):
            wanted[name] += (1 - math.exp(-0.7 * value.item())) * slope
    for name, slope in wanted.items():
        torch.testing.assert_close(slopes[name], slope, rtol=1e-9, atol=1e-12)


def test_edits_are_of_the_first_data_set_and_the_rest_of_the_others() -> None:
    data = join([numbered(1, 3), numbered(2, 4, 100), numbered(2, 4, 200)], [None] * 3)
    support, query = sides(Edits(data, None, 1, 4).batch(range(30)))
    assert support["x"].max() < 3 and {*(query["x"] // 100).flatten().tolist()} == {1, 2}
    assert all(len({*(row // 100).flatten().tolist()}) == 1 for row in query["x"])
    with pytest.raises(PlanError, match="found 3 examples of edits; expected 4 or more"):
        Edits(data, None, 4, 4)
    with pytest.raises(PlanError, match="found 8 examples of other data; expected 9 or more"):
        Edits(data, None, 1, 9)


def test_margins_are_how_far_answers_are_from_right() -> None:
    scores = torch.tensor([[2.0, 5.0, 1.0], [4.0, 0.0, 1.0], [9.0, 0.0, 0.0]])
    assert margins(scores, torch.tensor([0, 0, IGNORED])) == (3.0 + 0.0) / 2
    assert margins(scores[:1], torch.tensor([1])) == 0


def test_a_model_that_was_trained_for_it_is_edited_by_few_steps() -> None:
    """The loss by hand; and after training few steps change more of the answers, and the others stay."""
    model, row = Named(small()), ALGORITHMS["editable"]
    settings = {"edit_weight": 2.0, "locality_weight": 3.0}
    models = (model, Named(small()))
    loss, plain = (build_loss(m, "classification", row, Inner(2, 0.2), settings=settings) for m in models)
    batch = EPISODES.batch([0])
    ((support, query),) = tasks_of(batch)
    start = {name: x.detach() for name, x in model.named_parameters()}
    end = adapted_by_hand(start, support, 2, 0.2)

    def scores(found: dict[str, Tensor], x: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(model, found, (x,))
        return result

    before, after, changed = scores(start, query["x"]), scores(end, query["x"]), scores(end, support["x"])
    kl = nn.functional.kl_div(after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="batchmean")
    largest = changed.scatter(1, support["labels"][:, None], -torch.inf).amax(1)
    hinge = (largest - changed.gather(1, support["labels"][:, None]).squeeze(1)).clamp_min(0).mean()
    wanted = nn.functional.cross_entropy(before, query["labels"]) + 2 * hinge + 3 * kl
    torch.testing.assert_close(loss(model, batch).total, wanted, rtol=1e-9, atol=1e-12)

    wrong = Examples([{**item, "labels": 1 - item["labels"]} for item in of_sign(40, 1.0).items])
    others = of_sign(200, 1.0)
    edits = Edits(join([wrong, others], [None, None]), None, 1, 20)
    fit(plain.model, others, LOSSES["classification"], Options(steps=150, batch_size=32, learning_rate=0.02))
    fit(model, edits, loss, Options(steps=150, batch_size=4, learning_rate=0.02))
    unseen, held = replace(edits, seed=1).batch(range(40)), list[float]()
    for each in (plain, loss):
        at = {name: x.detach() for name, x in each.start().items()}

        def one(support: Batch, query: Batch, each: MetaLoss = each, at: dict[str, Tensor] = at) -> Tensor:
            return each.score(each.adapted(at, support, each.inner), support, query)

        held.append(float(over_tasks(one, unseen).mean()))
    assert held[1] > held[0] + 0.08, held
