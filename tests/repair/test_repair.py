"""REPAIR of modules: the mean and spread of hidden units, against their targets."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers_repair import assert_repaired, observed
from torch import Tensor, nn

from mergekit_lfm.arch import Units, read_table
from mergekit_lfm.errors import PlanError
from mergekit_lfm.repair import repair_module


def perceptron(seed: int, *widths: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for one, two in pairwise(widths):
        layers += [nn.Linear(one, two), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional(seed: int, normed: bool = False) -> nn.Sequential:
    """Convolutions in one and two dimensions; a BatchNorm follows the second, if the model has one."""
    torch.manual_seed(seed)
    norm = [nn.BatchNorm2d(5)] if normed else []
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 5, (1, 2)),
        *norm,
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(45, 6),
        nn.Tanh(),
        nn.Linear(6, 3),
    )
    for name, x in model.named_buffers():
        if not name.endswith("tracked"):
            x.copy_(torch.rand_like(x) + 0.5)
    return model


def midpoint(models: Sequence[nn.Module], weights: Sequence[float] = (0.5, 0.5)) -> Any:
    """The weighted mean of the models' parameters."""
    result = deepcopy(models[0])
    states = [model.state_dict() for model in models]
    result.load_state_dict(
        {
            name: sum(w * state[name] for w, state in zip(weights, states, strict=True)) if x.is_floating_point() else x
            for name, x in states[0].items()
        }
    )
    return result.eval()


def images(seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(n, 2, 5, 6) * 2 + 1 for n in (7, 9, 4)]


def rows(width: int, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.rand(n, width) for n in (30, 50, 20)]


# ------------------------------------------------------------------ modules


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.8)])
def test_hidden_units_of_a_perceptron_have_the_mean_and_spread_of_its_ends(weights: tuple[float, float]) -> None:
    ends = [perceptron(seed, 6, 40, 30, 20, 4) for seed in (0, 1)]
    merged, data = midpoint(ends, weights), rows(6)
    last = [x.clone() for x in merged[6].parameters()]
    seen: list[tuple[int, int]] = []
    done = repair_module(merged, ends, data, weights=weights, progress=lambda a, b: seen.append((a, b)))
    names = ["0", "2", "4"]
    assert [layer.name for layer in done.layers] == names
    assert [layer.units for layer in done.layers] == [40, 30, 20]
    assert done.left == {"6": "its outputs are those of the model"}
    assert_repaired(merged, ends, data, names, weights)
    assert all(torch.equal(x, y) for x, y in zip(merged[6].parameters(), last, strict=True))
    assert (seen[0], seen[-1], len(seen)) == ((30, 500), (500, 500), 15)


def test_the_reported_moments_are_those_of_the_layer() -> None:
    ends = [perceptron(seed, 6, 40, 4) for seed in (0, 1)]
    merged, data = midpoint(ends), rows(6)
    (mean, std), *of_ends = (observed(model, data, ["0"])["0"] for model in (merged, *ends))
    target = (of_ends[0][1] + of_ends[1][1]) / 2
    (layer,) = repair_module(merged, ends, data).layers
    assert layer.spread == pytest.approx(float((std / target).mean()))
    assert layer.spread < 0.9  # the collapse that the repair is for
    shift = (mean - (of_ends[0][0] + of_ends[1][0]) / 2).abs() / target
    assert layer.shift == pytest.approx(float(shift.mean()), abs=1e-6)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_size_of_the_hidden_units_does_not_matter(factor: float) -> None:
    repaired = []
    for size in (1.0, factor):
        ends: list[Any] = [perceptron(seed, 6, 40, 4) for seed in (0, 1)]
        with torch.no_grad():
            for parameter in (parameter for end in ends for parameter in end[0].parameters()):
                parameter.mul_(size)
        repaired.append(repair_module(midpoint(ends), ends, rows(6)).layers[0])
    assert repaired[1].spread == pytest.approx(repaired[0].spread, rel=1e-5)
    assert repaired[1].shift == pytest.approx(repaired[0].shift, abs=1e-6)


def test_standard_deviations_are_mixed_and_not_variances() -> None:
    ends: list[Any] = [nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)) for _ in range(2)]
    with torch.no_grad():
        for end, slope in zip(ends, (1.0, 3.0), strict=True):
            end[0].weight.fill_(slope)
    merged, data = midpoint(ends), rows(1)
    repair_module(merged, ends, data)
    assert observed(merged, data, ["0"])["0"][1] / torch.cat(data).double().std(correction=0) == pytest.approx(2.0)


def test_convolutions_are_repaired_by_channel() -> None:
    ends = [convolutional(seed) for seed in (0, 1)]
    merged = midpoint(ends)
    done = repair_module(merged, ends, images())
    assert [layer.name for layer in done.layers] == ["0", "2", "5"]
    assert_repaired(merged, ends, images(), ["0", "2", "5"])


def test_layers_before_a_batchnorm_are_left_to_its_statistics_which_are_re_estimated() -> None:
    ends = [convolutional(seed, normed=True).eval() for seed in (0, 1)]
    merged = midpoint(ends)
    done = repair_module(merged, ends, images())
    assert [layer.name for layer in done.layers] == ["0", "6"]
    assert done.batchnorms == ("3",)
    assert "BatchNorm follows" in done.left["2"]
    assert_repaired(merged, ends, images(), ["0", "6"])
    before = observed(merged, images(), ["2"])["2"]
    torch.testing.assert_close(merged[3].running_mean.double(), before[0], rtol=0.2, atol=0.2)  # means over batches
    again = deepcopy(merged)
    torch.optim.swa_utils.update_bn(images(), again)
    torch.testing.assert_close(again.state_dict(), merged.state_dict())


@pytest.mark.parametrize("normed", [False, True])
def test_layers_that_need_no_repair_stay_bit_for_bit(normed: bool) -> None:
    model = convolutional(0, normed).eval()
    if normed:
        torch.optim.swa_utils.update_bn(images(), model)
        model.eval()
    ends, kept = [deepcopy(model), deepcopy(model)], deepcopy(model.state_dict())
    done = repair_module(model, ends, images())
    assert all(torch.equal(x, kept[name]) for name, x in model.state_dict().items())
    assert [(layer.spread, layer.shift) for layer in done.layers] == [(1.0, 0.0)] * len(done.layers)


def test_units_that_are_constant_are_shifted_alone_and_those_dead_in_both_ends_stay_dead() -> None:
    ends: list[Any] = [perceptron(seed, 6, 8, 4) for seed in (0, 1)]
    with torch.no_grad():
        ends[1][0].weight[0] = -ends[0][0].weight[0]  # the merged unit 0 is constant
        for end, bias in zip(ends, (2.0, 4.0), strict=True):
            end[0].weight[1] = 0
            end[0].bias[1] = bias
    merged, data = midpoint(ends), rows(6)
    merged_unit = merged[0].weight[0].clone()
    repair_module(merged, ends, data)
    mean, std = observed(merged, data, ["0"])["0"]
    expected = sum(observed(end, data, ["0"])["0"][0] for end in ends) / 2
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(merged[0].weight[0], merged_unit)
    assert float(std[:2].max()) < 1e-6
    assert float(mean[1]) == pytest.approx(3.0)


def test_a_table_says_which_layers_write_hidden_units() -> None:
    """With a table, a skip path to which two layers add is left alone."""

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 9), nn.Linear(9, 5)
            self.head, self.idle = nn.Linear(5, 3), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            out: Tensor = self.head(x + self.down(self.up(x).relu()))
            return out

    torch.manual_seed(0)
    ends = [Skipping(), Skipping()]
    table = """
    stem.weight skip input
    stem.bias skip
    up.weight hidden skip'
    up.bias hidden
    down.weight skip hidden'
    down.bias skip
    head.weight class skip'
    head.bias class
    idle.weight class input
    idle.bias class
    """
    symmetries = read_table(table, {"skip": Units(5), "hidden": Units(9)}, ends[0].state_dict())
    merged, data = midpoint(ends), rows(6)
    done = repair_module(merged, ends, data, symmetries=symmetries)
    assert [layer.name for layer in done.layers] == ["up"]
    assert_repaired(merged, ends, data, ["up"])
    assert done.left["stem"] == done.left["down"] == "it writes skip, to which other layers add"
    assert "it writes class" in done.left["head"] and "not called" in done.left["idle"]


def test_layers_that_cannot_be_shifted_are_named() -> None:
    ends = [nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 3)) for _ in range(2)]
    merged, data = midpoint(ends), rows(6)
    done = repair_module(merged, ends, data)
    assert [layer.name for layer in done.layers] == ["2"]
    assert "no bias" in done.left["0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merged": nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 2))}, r"nothing to repair(.|\n)*no bias"),
        ({"merged": nn.Sequential(nn.Tanh(), nn.Embedding(3, 2))}, "nothing to repair|failed on"),
        ({"weights": (0.5, 0.6)}, "weights are 0.5, 0.6; expected 2 numbers"),
        ({"weights": (1.0,)}, "expected 2 numbers"),
        ({"weights": (1.5, -0.5)}, "expected 2 numbers"),
        ({"ends": []}, "found no ends"),
        ({"ends": [perceptron(0, 6, 5, 4), perceptron(1, 6, 4)]}, "has no 2|not called|units"),
        ({"ends": [perceptron(0, 6, 5, 4), perceptron(1, 6, 9, 4)]}, "0: 9 units, the merged model has 5"),
        ({"data": []}, "no batch"),
        ({"data": [torch.full((3, 6), torch.nan)]}, "0: not finite"),
    ],
)
def test_models_that_cannot_be_repaired(change: dict[str, Any], message: str) -> None:
    given = {"merged": perceptron(2, 6, 5, 4), "ends": [perceptron(0, 6, 5, 4), perceptron(1, 6, 5, 4)]}
    given = {**given, "data": rows(6), **change}
    with pytest.raises(PlanError, match=message):
        repair_module(given.pop("merged"), given.pop("ends"), given.pop("data"), **given)
