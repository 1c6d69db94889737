"""The training loop: against closed forms and AdamW written from the paper; cut, killed and gone on from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_training import Killed, Net, data, numbers
from torch import Tensor, nn

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.pauses import Pauses
from mergekit_lfm.recipe.training import Group, Options
from mergekit_lfm.train.examples import Examples, join, split
from mergekit_lfm.train.hooks import Ball, Hook, Masks, MovingAverage, Phases, Pull, Snapshots
from mergekit_lfm.train.loop import STATE, fit, mean_loss
from mergekit_lfm.train.losses import Terms, squares, towards
from mergekit_lfm.train.state import METRICS


def test_a_line_becomes_that_of_least_squares() -> None:
    model, examples = Net(), data()
    fit(model, examples, squares, Options(steps=1000, batch_size=24, learning_rate=0.1, schedule="cosine", clip=0.0))
    rows = torch.stack([torch.cat([item["x"], torch.ones(1).double()]) for item in examples.items])
    wanted = torch.linalg.lstsq(rows, torch.stack([item["labels"] for item in examples.items])[:, None]).solution
    assert torch.allclose(numbers(model), wanted.flatten(), atol=1e-6)


def test_three_steps_are_those_of_the_paper() -> None:
    """AdamW, algorithm 2 of arXiv 1711.05101, in float64, with weight decay for matrices alone."""
    model, examples = Net(), data(4)
    options = Options(steps=3, batch_size=4, learning_rate=0.1, weight_decay=0.2, clip=0.5, warmup=0.34)
    weight, bias = (x.detach().clone() for x in model.parameters())
    moments = [[torch.zeros_like(x), torch.zeros_like(x)] for x in (weight, bias)]
    x = torch.stack([item["x"] for item in examples.items])
    y = torch.stack([item["labels"] for item in examples.items])
    for step in (1, 2, 3):
        rate = 0.1 if step == 1 else 0.1 * (1 - (step - 2) / 2)
        error = 2 * (x @ weight[0] + bias - y) / 4
        gradients = [(error @ x)[None], error.sum()[None]]
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for value, gradient, decay, (first, second) in zip((weight, bias), gradients, (0.2, 0), moments, strict=True):
            clipped = gradient * min(1.0, float(0.5 / (norm + 1e-6)))
            first.mul_(0.9).add_(0.1 * clipped)
            second.mul_(0.999).add_(0.001 * clipped**2)
            hats = first / (1 - 0.9**step), second / (1 - 0.999**step)
            value -= rate * (hats[0] / (hats[1].sqrt() + 1e-8) + decay * value)
    fit(model, examples, squares, options)
    assert torch.allclose(numbers(model), torch.cat([weight.flatten(), bias]), atol=1e-12)


def test_groups_have_rates_and_decays_of_their_own() -> None:
    """One step of AdamW is its rate times the sign of the gradient, and the decay; the first match counts."""
    model, x = Net(deep=True), data(8)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    groups = (Group("second.weight", 0.01, 0.5), Group("second.*", 0.02), Group("*.bias", weight_decay=0.9))
    model.drop.p = 0.0
    fit(model, x, squares, Options(steps=1, batch_size=8, learning_rate=0.1, weight_decay=0.2, groups=groups, clip=0.0))
    for name, rate, decay in (
        ("second.weight", 0.01, 0.5),
        ("second.bias", 0.02, 0.0),  # decay is for matrices alone
        ("first.bias", 0.1, 0.0),
        ("first.weight", 0.1, 0.2),
    ):
        step = dict(model.named_parameters())[name].detach() - start[name] * (1 - rate * decay)
        assert torch.allclose(step.abs(), torch.full_like(step, rate), rtol=1e-4)
    for match, why in (("third.*", "has such a name"), ("first.weight", "is left for it by the groups before")):
        with pytest.raises(PlanError, match=f"groups: found '{match}', and no trained parameter {why}"):
            fit(Net(), data(), squares, Options(groups=(Group("first.*"), Group(match)), steps=1))
    with pytest.raises(PlanError, match=r"groups, 'a': learning_rate is 0; .*groups, 'a': weight_decay is -1"):
        Options(groups=(Group("a", 0, -1),))


def test_a_share_of_the_data_is_held_out() -> None:
    sets = [data(20), data(10)]
    kept, held = split(sets, 0.2, seed=3)
    numbers = [[id(item) for item in each.items] for each in (*sets, *kept, held)]
    assert [len(each) for each in numbers[2:]] == [16, 8, 6]
    assert sorted(numbers[0] + numbers[1]) == sorted(
        numbers[2] + numbers[3] + numbers[4]
    )  # each example is in one part
    again = split(sets, 0.2, seed=3)[1], split(sets, 0.2, seed=4)[1]
    assert [each.digest == held.digest for each in again] == [True, False]
    with pytest.raises(PlanError, match=r"dev is 0.01 of 30 examples, less than one"):
        split(sets, 0.01, 0)


def killed_at(step: int) -> Any:
    def tell(done: int, _: int, __: Mapping[str, Any]) -> None:
        if done == step:
            raise Killed

    return tell


@pytest.mark.parametrize("every_s", [0.0, 1e9])
@pytest.mark.parametrize("judged", [True, False])
def test_killed_at_any_step_it_goes_on_to_the_same_bytes(every_s: float, judged: bool, tmp_path: Path) -> None:
    """With a state at each step, and without one; dropout, averages or a development set, and a ball go on."""
    options = Options(steps=9, batch_size=5, learning_rate=0.01, evaluate_every=2, accumulate=2)
    dev = data(7) if judged else None

    def hooks() -> list[Hook]:
        return [Ball(0.05, "l2"), *([] if judged else [MovingAverage(0.9)])]

    whole = Net(deep=True)
    history = fit(whole, data(), squares, options, dev=dev, hooks=hooks())
    for step in range(1, 9):
        place = tmp_path / f"{every_s}-{step}"
        pauses = Pauses(every_s=every_s, saving_share=math.inf)
        how: dict[str, Any] = {"dev": dev, "place": place, "request": "r"}
        with pytest.raises(Killed):
            fit(Net(deep=True), data(), squares, options, hooks=hooks(), pauses=pauses, tell=killed_at(step), **how)
        again, steps = Net(deep=True), list[int]()
        found = fit(
            again, data(), squares, options, hooks=hooks(), tell=lambda done, *_, steps=steps: steps.append(done), **how
        )
        assert torch.equal(numbers(again), numbers(whole))
        assert steps[0] == (step if every_s == 0 else 1)  # the last state is that before the kill
        assert (found.best, found.best_step) == (history.best, history.best_step)
        lines = [json.loads(line) for line in (place / METRICS).read_text().splitlines()]
        assert [line["step"] for line in lines] == [*range(1, 10)]
        assert [line["loss"] for line in lines] == [line["loss"] for line in history.record]


def test_a_state_of_another_request_is_not_gone_on_from(tmp_path: Path) -> None:
    options = Options(steps=4, batch_size=5, learning_rate=0.01)
    pauses = Pauses(every_s=0, saving_share=math.inf)
    with pytest.raises(Killed):
        fit(Net(), data(), squares, options, place=tmp_path, request="a", pauses=pauses, tell=killed_at(3))
    steps = list[int]()
    for content in (None, b"damaged"):
        if content is not None:
            (tmp_path / STATE).write_bytes(content)
        fit(Net(), data(), squares, options, place=tmp_path, request="b", tell=lambda done, *_: steps.append(done))
    assert steps == [1, 2, 3, 4] * 2


def test_a_batch_in_parts_is_the_batch() -> None:
    models = [Net() for _ in range(3)]
    for model, parts in zip(models, (1, 2, 5), strict=True):
        fit(model, data(), squares, Options(steps=6, batch_size=5, learning_rate=0.1, accumulate=parts))
    assert torch.allclose(numbers(models[0]), numbers(models[1]), atol=1e-12)
    assert torch.allclose(numbers(models[0]), numbers(models[2]), atol=1e-12)


def test_random_numbers_outside_are_as_before_and_the_seed_decides_those_inside() -> None:
    results = []
    for seed in (1, 1, 2):
        model, examples = Net(deep=True), data()
        before = torch.random.get_rng_state()
        fit(model, examples, squares, Options(steps=3, batch_size=5, seed=seed))
        assert torch.equal(torch.random.get_rng_state(), before)
        assert not model.training
        results.append(numbers(model))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_the_state_with_the_least_loss_on_the_development_set_stays_and_patience_ends() -> None:
    """The training data lead away from the development set: the best state is one of the first."""
    options = Options(steps=100, batch_size=24, learning_rate=0.2, evaluate_every=1, patience=3, schedule="constant")
    model, dev = Net(), data(6)
    away = Examples([{"x": item["x"], "labels": -item["labels"]} for item in data().items])
    fit(model, dev, squares, Options(steps=10, batch_size=6, learning_rate=0.2))
    history = fit(model, away, squares, options, dev=dev)
    assert history.best_step == 1 and history.steps == 4 and len(history.record) == 4
    assert mean_loss(model, dev, squares, options) == history.best == history.record[0]["dev_loss"]


def test_a_loss_that_is_not_finite_stops_and_names_the_step(tmp_path: Path) -> None:
    examples = data()
    calls = list[int]()

    def broken(model: nn.Module, batch: Mapping[str, Tensor]) -> Terms:
        calls.append(1)
        total, number = squares(model, batch)
        return Terms(total * (math.nan if len(calls) == 4 else 1), number)

    model, before = Net(), Net()
    with pytest.raises(PlanError, match=r"the loss of step 4 is nan, expected finite numbers; .*state.safetensors"):
        fit(model, examples, broken, Options(steps=9, batch_size=5), place=tmp_path, request="r")
    fit(before, examples, squares, Options(steps=9, batch_size=5), tell=None, place=tmp_path / "b", request="r")
    calls.append(1)
    fit(model, examples, broken, Options(steps=9, batch_size=5), place=tmp_path, request="r")  # the state is whole
    assert torch.equal(numbers(model), numbers(before))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.5, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.5]), ("cosine", [0.5, 1, 1, 0.5])],
)
def test_rates_rise_and_fall(schedule: Any, expected: list[float]) -> None:
    options = Options(steps=4, learning_rate=1.0, schedule=schedule, warmup=0.5)
    assert [options.rate(step) for step in range(4)] == pytest.approx(expected)


def test_settings_out_of_range_are_refused_together() -> None:
    with pytest.raises(
        PlanError, match=r"steps is 0; expected at least 1; .*learning_rate is -1; .*schedule is 'linar'"
    ):
        Options(steps=0, learning_rate=-1, schedule="linar")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="accumulate is 9; expected at most batch_size, 4"):
        Options(batch_size=4, accumulate=9)
    with pytest.raises(PlanError, match="no parameter of the model is trained"):
        fit(Net().requires_grad_(False), data(), squares, Options())


def test_each_example_once_in_a_round_and_data_sets_up_to_their_cap() -> None:
    examples = data(10)
    seen = [number for step in range(5) for number in examples.step(step, 4, seed=1)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == [*range(10)] and seen[:10] != seen[10:]
    assert examples.step(1, 4, 1) != examples.step(1, 4, 2)
    mixed = join([data(10), data(3), data(2)], [4, None, 9])
    rounds = [[number for step in range(3) for number in mixed.step(3 * i + step, 3, 0)] for i in range(20)]
    assert all(len({*each}) == 9 and {10, 11, 12, 13, 14} < {*each} for each in rounds)
    assert {number for each in rounds for number in each} == {*range(15)}  # another four of the first set each time


def test_an_average_of_weights_is_that_by_hand() -> None:
    model, trace = Net(), list[Tensor]()

    class Trace(Hook):
        def after(self, done: int, parameters: Mapping[str, nn.Parameter]) -> None:  # noqa: ARG002
            trace.append(torch.cat([x.detach().flatten().clone() for x in parameters.values()]))

    average = numbers(model).float()
    fit(model, data(), squares, Options(steps=5, batch_size=5, learning_rate=0.1), hooks=[Trace(), MovingAverage(0.2)])
    for done, x in enumerate(trace, 1):
        decay = min(0.2, (1 + done) / (10 + done))
        average = decay * average + (1 - decay) * x.float()
    assert torch.allclose(numbers(model).float(), average, atol=1e-6)


def test_a_group_is_trained_as_if_alone_at_its_rate() -> None:
    """Two lines that do not depend on each other: each as if it was trained alone at its rate."""

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Terms:
        apart = [net(batch["x"]) - batch["labels"] for net in model.children()]
        return Terms(torch.stack([x.square().sum() for x in apart]).sum(), len(batch["labels"]))

    how: dict[str, Any] = {"steps": 6, "batch_size": 5, "clip": 0.0}
    both = nn.ModuleList([Net(), Net()])
    fit(both, data(), loss, Options(learning_rate=0.01, groups=(Group("1.*", learning_rate=0.07),), **how))
    for net, rate in zip(both, (0.01, 0.07), strict=True):
        alone = nn.ModuleList([Net()])
        fit(alone, data(), loss, Options(learning_rate=rate, **how))
        assert torch.allclose(numbers(net), numbers(alone), atol=1e-12)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_ball_holds_the_change(norm: Any) -> None:
    model = Net()
    start = numbers(model)
    fit(model, data(), squares, Options(steps=40, batch_size=5, learning_rate=0.1), hooks=[Ball(0.25, norm)])
    change = numbers(model) - start
    length = float(change.norm() if norm == "l2" else change.abs().max())
    assert length == pytest.approx(0.25, abs=1e-9)


def test_phases_and_masks_train_the_parts_they_name_alone() -> None:
    model = Net(deep=True)
    names = [name for name, _ in model.named_parameters()]
    seen = list[list[str]]()
    before = {name: x.detach().clone() for name, x in model.named_parameters()}

    class Watch(Hook):
        def after(self, done: int, parameters: Mapping[str, nn.Parameter]) -> None:  # noqa: ARG002
            seen.append([name for name, x in parameters.items() if not torch.equal(x, before[name])])

    phases = Phases([(0, frozenset({"second.weight"})), (2, frozenset(names))])
    fit(model, data(), squares, Options(steps=3, batch_size=5, learning_rate=0.1), hooks=[phases, Watch()])
    assert seen == [["second.weight"], ["second.weight"], names]
    model, rest = Net(deep=True), [name for name in names if not name.endswith("weight")]
    seen, before = [], {name: x.detach().clone() for name, x in model.named_parameters()}
    phases = Phases([(0, frozenset({"second.weight"})), (2, frozenset({"first.weight"}))])
    fit(model, data(), squares, Options(steps=2, batch_size=5, learning_rate=0.1), hooks=[phases, Watch()])
    assert rest and [{*each} for each in seen] == [{*rest, "second.weight"}] * 2  # unnamed ones are always trained
    model = Net()
    mask = torch.tensor([[1.0, 0, 0, 1, 0]])
    start = model.first.weight.detach().clone()
    fit(
        model, data(), squares, Options(steps=3, batch_size=5, learning_rate=0.1), hooks=[Masks({"first.weight": mask})]
    )
    assert torch.equal(model.first.weight != start, mask.bool())


def test_snapshots_are_the_weights_on_the_way_and_a_pull_goes_towards_others(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    options = Options(steps=4, batch_size=5, learning_rate=0.1, schedule="constant")
    model, shorter = Net(), Net()
    fit(model, data(), squares, options, hooks=[Snapshots(tmp_path, 2)])
    fit(shorter, data(), squares, Options(steps=2, batch_size=5, learning_rate=0.1, schedule="constant"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002.safetensors", "step-000004.safetensors"]
    halfway = load_file(tmp_path / "step-000002.safetensors")
    assert torch.equal(torch.cat([x.flatten() for x in halfway.values()]).sort().values, numbers(shorter).sort().values)
    pulled, zeros = Net(), {name: torch.zeros_like(x) for name, x in Net().named_parameters()}
    fit(
        pulled, data(), squares, Options(steps=1, batch_size=5, learning_rate=0.1), hooks=[Pull(lambda: zeros, 0.25, 1)]
    )
    once = Net()
    fit(once, data(), squares, Options(steps=1, batch_size=5, learning_rate=0.1))
    assert torch.allclose(numbers(pulled), 0.25 * numbers(once), atol=1e-12)


def test_a_penalty_holds_the_start() -> None:
    """With the gradient of a quadratic loss, the minimum between data and start is that of ridge regression."""
    model, examples = Net(), data()
    start = {name: x.detach().clone() for name, x in model.named_parameters()}
    loss = towards(squares, start, 3.0)
    fit(model, examples, loss, Options(steps=1000, batch_size=24, learning_rate=0.1, schedule="cosine", clip=0.0))
    rows = torch.stack([torch.cat([item["x"], torch.ones(1).double()]) for item in examples.items])
    wanted = torch.stack([item["labels"] for item in examples.items])
    first = torch.cat([x.flatten() for x in start.values()])
    gram = 2 * rows.T @ rows / 24 + 3 * torch.eye(6).double()
    solution = torch.linalg.solve(gram, 2 * rows.T @ wanted / 24 + 3 * first)
    assert torch.allclose(numbers(model), solution, atol=1e-5)


class Normed(nn.Module):
    """A layer, batch normalisation and a number as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.line, self.norm = nn.Linear(5, 1), nn.BatchNorm1d(1)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.line(x)) * self.scale
        return out.squeeze(-1)


def test_statistics_of_normalisation_stay_and_a_parameter_without_axes_is_gone_on_with(tmp_path: Path) -> None:
    options = Options(steps=4, batch_size=5, learning_rate=0.1)
    examples = data(dtype=torch.float32)
    whole = Normed()
    fit(whole, examples, squares, options, hooks=[MovingAverage(0.5)])
    assert float(whole.norm.running_mean) == 0 and float(whole.norm.running_var) == 1  # type: ignore[arg-type]
    how: dict[str, Any] = {"place": tmp_path, "request": "r", "pauses": Pauses(every_s=0, saving_share=math.inf)}
    with pytest.raises(Killed):
        fit(Normed(), examples, squares, options, hooks=[MovingAverage(0.5)], tell=killed_at(3), **how)
    again = Normed()
    fit(again, examples, squares, options, hooks=[MovingAverage(0.5)], **how)
    assert torch.equal(numbers(again), numbers(whole))


def test_without_a_request_the_data_and_options_are_it(tmp_path: Path) -> None:
    steps = list[int]()
    for rate in (0.1, 0.1, 0.2):
        options = Options(steps=3, batch_size=5, learning_rate=rate)
        fit(Net(), data(), squares, options, place=tmp_path, tell=lambda done, *_: steps.append(done))
    assert steps == [1, 2, 3, 1, 2, 3]


def test_a_state_without_its_record_is_not_gone_on_from(tmp_path: Path) -> None:
    fit(Net(), data(), squares, Options(steps=3, batch_size=5), place=tmp_path, request="r")
    (tmp_path / METRICS).write_text("damaged")
    history = fit(Net(), data(), squares, Options(steps=3, batch_size=5), place=tmp_path, request="r")
    assert len(history.record) == 3


def test_numbers_that_are_not_finite_are_found_before_they_are_kept(tmp_path: Path) -> None:
    """A gradient, parameters after a step, and a loss on the development set."""
    options = Options(steps=5, batch_size=5)

    def steep(model: nn.Module, batch: Mapping[str, Tensor]) -> Terms:
        total, number = squares(model, batch)
        return Terms(total + (total * 0).sqrt(), number)  # the slope of a root at 0

    with pytest.raises(PlanError, match=r"the loss of step 1 is .*, and its gradient is not finite"):
        fit(Net(), data(), steep, options, place=tmp_path)
    with pytest.raises(PlanError, match="step 1 makes parameters that are not finite"):
        fit(Net(dtype=torch.float32), data(dtype=torch.float32), squares, Options(steps=2, learning_rate=1e39))
    broken = Examples([{"x": torch.full((5,), math.nan).double(), "labels": torch.tensor(1.0).double()}])
    with pytest.raises(PlanError, match="the loss on the development set is nan after step 5"):
        fit(Net(), data(), squares, options, dev=broken)
    with pytest.raises(PlanError, match="other weights in place of those"):
        fit(Net(), data(), squares, options, dev=data(), hooks=[MovingAverage()])
