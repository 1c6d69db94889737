"""Inner steps that are learned: by a network for each number, and slopes behind a gate."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from test_adapt import EPISODES, Named, adapted_by_hand, loss_by_hand, slopes_of, small, tasks_of
from torch import Tensor, nn

from mergekit_lfm.meta.algorithms import build_loss
from mergekit_lfm.meta.losses import Inner
from mergekit_lfm.meta.optimiser import Gates, scaled
from mergekit_lfm.recipe.meta_algorithms import ALGORITHMS


def test_a_learned_step_is_an_lstm_whose_cells_are_the_models_numbers() -> None:
    """Against torch's own LSTM cell, and the equations of the gates, number by number."""
    torch.manual_seed(3)
    model, batch = Named(small()), EPISODES.batch([0])
    start = {name: x.detach().clone() for name, x in model.named_parameters()}
    loss = build_loss(model, "classification", ALGORITHMS["meta_lstm"], Inner(2, 0.1), settings={"hidden": 5})
    gates = loss.beside
    assert isinstance(gates, Gates)
    with torch.no_grad():
        for weight in gates.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    ((support, _),) = tasks_of(batch)
    found = loss.adapted(loss.start(), support, loss.inner)

    cell = nn.LSTMCell(4, 5, dtype=torch.float64)
    taking, keeping, giving, fresh = gates.read.weight.chunk(4)
    bias = gates.read.bias.chunk(4)
    with torch.no_grad():
        rows = torch.cat([taking, keeping, fresh, giving])  # in torch's order
        cell.weight_ih.copy_(rows[:, :4])
        cell.weight_hh.copy_(rows[:, 4:])
        cell.bias_ih.copy_(torch.cat([bias[0], bias[1], bias[3], bias[2]]))
        cell.bias_hh.zero_()
    now: dict[str, Tensor] = dict(start)
    count = sum(x.numel() for x in start.values())
    memory: tuple[Tensor, Tensor] | None = None
    before = [torch.ones(count).double(), torch.zeros(count).double()]
    for _ in range(2):
        now = {name: x.detach().requires_grad_(True) for name, x in now.items()}
        value = loss_by_hand(now, support)
        slopes = torch.cat([x.flatten() for x in torch.autograd.grad(value, [*now.values()])])
        memory = cell(torch.cat([scaled(slopes), scaled(value.detach().expand(count))], -1), memory)
        flat = torch.cat([x.detach().flatten() for x in now.values()])
        for number, gate in enumerate((gates.keep, gates.take)):
            seen = torch.cat([memory[0], flat[:, None], before[number][:, None]], -1)
            before[number] = (seen @ gate.weight.T + gate.bias).squeeze(-1).sigmoid()
        flat, done = before[0] * flat - before[1] * slopes, 0
        for name, x in now.items():
            now[name], done = flat[done : done + x.numel()].view(x.shape), done + x.numel()
    for name, x in now.items():
        torch.testing.assert_close(found[name], x, rtol=1e-9, atol=1e-11)


def test_before_training_learned_steps_are_nearly_descent() -> None:
    model, batch = Named(small()), EPISODES.batch([0])
    start = {name: x.detach().clone() for name, x in model.named_parameters()}
    loss = build_loss(model, "classification", ALGORITHMS["meta_lstm"], Inner(3, 0.2))
    ((support, _),) = tasks_of(batch)
    found, plain = loss.adapted(loss.start(), support, loss.inner), adapted_by_hand(start, support, 3, 0.2)
    for name, x in plain.items():
        torch.testing.assert_close(found[name], x, rtol=0.05, atol=0.02)


def test_inputs_of_a_learned_step_are_size_and_sign() -> None:
    found = scaled(torch.tensor([1.0, -math.e, 0.0, 1e-5, -1e-5]).double())
    wanted = [(0.0, 1.0), (0.1, -1.0), (-1.0, 0.0), (-1.0, 1e-5 * math.exp(10)), (-1.0, -1e-5 * math.exp(10))]
    torch.testing.assert_close(found, torch.tensor(wanted).double())


def test_a_gate_of_slopes_is_learned_from_the_next_task_too() -> None:
    """At first steps are plain descent; the slope of the gate is that of finite differences."""
    model, batch = Named(small()), EPISODES.batch([0, 1, 2])
    start = {name: x.detach().clone() for name, x in model.named_parameters()}
    loss = build_loss(model, "classification", ALGORITHMS["gram"], Inner(2, 0.2))
    tasks, gates = tasks_of(batch), dict(loss.beside.named_parameters())  # type: ignore[union-attr]
    ends = [adapted_by_hand(start, task.support, 2, 0.2) for task in tasks]
    judged = [(loss_by_hand(ends[n], tasks[n].query) + loss_by_hand(ends[n], tasks[n - 2].query)) / 2 for n in range(3)]
    assert float(loss(model, batch).total.detach()) == pytest.approx(float(sum(x.item() for x in judged)), rel=1e-12)
    zero = torch.zeros(3, requires_grad=True)
    loss.gated("inner.3.bias", zero).sum().backward()  # type: ignore[attr-defined]
    assert zero.grad is not None and bool(zero.grad.isfinite().all())  # as of a LoRA's A at the first step
    slopes: Mapping[str, Tensor] = slopes_of(loss, model, batch)
    for name, place in (("inner/0/weight", (0, 2)), ("inner/3/bias", (1, 1))):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                gates[name][place] += sign * 1e-5
                sides.append(float(loss(model, batch).total))
                gates[name][place] -= sign * 1e-5
        assert slopes[f"meta.{name}"][place] == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-5)
