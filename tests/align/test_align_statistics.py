"""Alignment by activations: correlations, cross moments from files and mappings, and rotations of activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_align import (
    Tensors,
    convolutions,
    furthest,
    loaded,
    mlp,
    mlp_table,
    planted,
    rewritten_model,
    table,
    tensors_of,
    texts,
)
from scipy.optimize import linear_sum_assignment

from mergekit_lfm.align.correlations import Triple, UnitMoments
from mergekit_lfm.align.find import find_transform
from mergekit_lfm.arch import Units, read_table
from mergekit_lfm.arch.table import Part
from mergekit_lfm.artifacts.transform import Transform, TransformInfo, UnitsElement
from mergekit_lfm.collect.run import collect
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.views.rewritten import rewrite

WIDTHS = (7, 12, 9, 4)


def hidden(tensors: Tensors, inputs: torch.Tensor) -> list[torch.Tensor]:
    """The inputs of every layer of an MLP."""
    read = [inputs]
    for i in range(len(WIDTHS) - 2):
        read.append((read[-1] @ tensors[f"{i}.weight"].T + tensors[f"{i}.bias"]).relu())
    return read


def moments(a: Tensors, b: Tensors, inputs: torch.Tensor) -> dict[str, Triple]:
    """The cross moments of two MLPs, the first model's first."""
    found = {}
    for i, (x, y) in enumerate(zip(hidden(a, inputs), hidden(b, inputs), strict=True)):
        x, y = (torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], 1) for z in (x, y))
        found[f"{i}.weight"] = (x.T @ y / len(x), x.square().mean(0), y.square().mean(0))
    return found


def some_inputs(count: int = 300) -> torch.Tensor:
    return torch.randn(count, WIDTHS[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def order_of(element: object) -> list[int]:
    assert isinstance(element, UnitsElement) and element.order is not None
    found: list[int] = element.order.tolist()
    return found


@pytest.mark.parametrize("seed", range(3))
def test_units_are_paired_by_numpys_correlations(seed: int) -> None:
    a, b, symmetries = mlp(WIDTHS, seed), mlp(WIDTHS, seed + 10), mlp_table(WIDTHS)
    inputs = some_inputs()
    given = moments(a, b, inputs)
    transform = find_transform(b, a, "activation_matching", symmetries=symmetries, statistics=given)
    for i, (x, y) in enumerate(zip(hidden(a, inputs)[1:], hidden(b, inputs)[1:], strict=True)):
        with np.errstate(invalid="ignore"):  # for units that are never active
            both = np.nan_to_num(np.corrcoef(x.numpy().T, y.numpy().T)[: x.shape[1], x.shape[1] :])
        rows, best = linear_sum_assignment(both, maximize=True)  # units that are never active may be paired with any
        found = order_of(transform.elements[f"p{i}"])
        assert [both[i, j] for i, j in enumerate(found)] == pytest.approx(both[rows, best].tolist(), abs=1e-12)
    assert transform.info.exact


def test_a_dead_unit_is_correlated_with_none() -> None:
    a, symmetries = mlp(WIDTHS, 0), mlp_table(WIDTHS)
    a["0.bias"].abs_()
    a["1.bias"].abs_().add_(3)
    a["0.weight"][3], a["0.bias"][3] = 0, 5  # always 5
    a["1.weight"][4], a["1.bias"][4] = 0, -1  # never active
    b = rewrite(a, planted(a, symmetries, 1))
    inputs = some_inputs()
    found = find_transform(b, a, "activation_matching", symmetries=symmetries, statistics=moments(a, b, inputs))
    assert all(torch.equal(x, a[name]) for name, x in rewrite(b, found).items())


@pytest.mark.parametrize("method", ["activation_matching", "ot"])
def test_dead_units_stay_in_their_places(method: str) -> None:
    """Nothing decides how dead units are paired; the others are paired all the same."""
    a, symmetries = mlp(WIDTHS, 0), mlp_table(WIDTHS)
    a["0.bias"].abs_()
    a["1.bias"].abs_()
    dead, live = torch.tensor([1, 4, 5, 9]), torch.tensor([0, 2, 3, 6, 7, 8, 10, 11])
    a["0.weight"][dead], a["0.bias"][dead] = 0, 0
    order = torch.arange(12)
    order[live] = live[torch.randperm(8, generator=torch.Generator().manual_seed(1))]
    b = rewrite(a, Transform(symmetries, {"p0": UnitsElement(order)}, TransformInfo("planted")))
    given = moments(a, b, some_inputs())
    found = find_transform(b, a, method, symmetries=symmetries, statistics=given)
    assert order_of(found.elements["p0"]) == order.argsort().tolist()
    assert "p1" not in found.elements


@pytest.mark.parametrize(
    ("method", "options"), [("activation_matching", {}), ("ot", {}), ("ot", {"regularisation": 1})]
)
def test_statistics_of_zeros_leave_the_model_alone(method: str, options: dict[str, Any]) -> None:
    a, b, symmetries = mlp(WIDTHS, 0), mlp(WIDTHS, 1), mlp_table(WIDTHS)
    nothing = {name: tuple(x * 0 for x in triple) for name, triple in moments(a, b, some_inputs()).items()}
    found = find_transform(b, a, method, symmetries=symmetries, statistics=nothing, **options)  # type: ignore[arg-type]
    assert found.info.exact
    assert furthest(rewrite(b, found), b) == 0


def test_entries_of_a_unit_are_read_together() -> None:
    """After flattening, a layer reads several entries of each unit."""
    symmetries = read_table("write units input\nread class units'", {"units": Units(5)}, ["write", "read"])
    draw = torch.Generator().manual_seed(0)
    a = {"write": torch.randn(5, 3, generator=draw), "read": torch.randn(2, 15, generator=draw)}
    b = rewrite(a, planted(a, symmetries, 1))
    x = torch.randn(200, 5, 3, dtype=torch.float64, generator=draw)
    order = [int((b["write"] == row).all(1).nonzero()) for row in a["write"]]
    y = torch.empty_like(x)
    y[:, order] = x
    x, y = (torch.cat([z.flatten(1), torch.ones(200, 1)], 1) for z in (x, y))
    given = {"read": (x.T @ y / 200, x.square().mean(0), y.square().mean(0))}
    found = find_transform(b, a, "activation_matching", symmetries=symmetries, statistics=given)
    assert order_of(found.elements["units"]) == order


@pytest.mark.parametrize(
    ("kind", "options"), [("llama", {}), ("gpt2", {}), ("bert", {}), ("qwen3", {"tie_word_embeddings": True})]
)
def test_permutations_of_networks_are_recovered(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    a = loaded(kind, 0, tmp_path / "a", **options)
    b = rewritten_model(a, rewrite(tensors_of(a), planted(tensors_of(a), table(a), 3)), tmp_path / "b")
    task = "embedding" if kind == "bert" else "lm"
    file = collect("cross", a.path, texts(), tmp_path / "ab", other=b.path, task=task).path  # type: ignore[arg-type]
    found = find_transform(b, a, "activation_matching", statistics=file)
    assert all(torch.equal(x, tensors_of(a)[name]) for name, x in rewrite(tensors_of(b), found).items())


@pytest.mark.parametrize(
    ("kind", "options"), [("llama", {}), ("llama", {"num_key_value_heads": 4}), ("qwen3", {}), ("qwen2", {})]
)
def test_rotations_are_recovered_from_activations(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    a = loaded(kind, 0, tmp_path / "a", torch.float64, **options)
    moved = rewrite(tensors_of(a), planted(tensors_of(a), table(a), 3, rotate=True))
    b = rewritten_model(a, moved, tmp_path / "b")
    data = texts(count=12)
    file = collect("cross", a.path, data, tmp_path / "ab", other=b.path, task="lm", dtype="float64").path
    found = find_transform(b, a, "rotation", statistics=file)
    # as exact as what the file holds, in float32
    assert furthest(rewrite(moved, found), tensors_of(a)) < 1e-4
    assert furthest(moved, tensors_of(a)) > 0.5


def test_a_file_may_be_of_the_models_in_either_order(tmp_path: Path) -> None:
    a, b, c = (loaded("llama", seed, tmp_path / str(seed)) for seed in range(3))

    def collected(first: Path, second: Path, name: str) -> Path:
        return collect("cross", first, texts(), tmp_path / name, other=second, task="lm").path

    ab, ba = collected(a.path, b.path, "ab"), collected(b.path, a.path, "ba")
    one, two = (find_transform(b, a, "activation_matching", statistics=file) for file in (ab, ba))
    found, expected = (rewrite(tensors_of(b), transform) for transform in (one, two))
    assert all(torch.equal(x, expected[name]) for name, x in found.items())
    back = rewrite(tensors_of(a), find_transform(a, b, "activation_matching", statistics=ab))
    assert furthest(back, tensors_of(a)) > 0.1
    of_tensors = find_transform(tensors_of(b), tensors_of(a), "activation_matching", symmetries=table(a), statistics=ab)
    assert all(torch.equal(x, expected[name]) for name, x in rewrite(tensors_of(b), of_tensors).items())
    with pytest.raises(PlanError, match=rf"is of the models {a.content} and {b.content}, expected {a.content} \("):
        find_transform(c, a, "activation_matching", statistics=ab)


def test_refuses_statistics_that_do_not_fit(tmp_path: Path) -> None:
    a, b = (loaded("llama", seed, tmp_path / str(seed)) for seed in range(2))
    gram = collect("gram", a.path, texts(), tmp_path / "gram", task="lm").path
    with pytest.raises(PlanError, match="holds gram statistics, expected cross moments"):
        find_transform(b, a, "activation_matching", statistics=gram)
    with pytest.raises(PlanError, match="needs cross moments"):
        find_transform(b, a, "activation_matching")
    some = collect("cross", a.path, texts(), tmp_path / "some", other=b.path, task="lm", layers=["down_proj"])
    with pytest.raises(PlanError, match=r"has no moments for residual, heads.0, heads.1: no linear layer"):
        find_transform(b, a, "activation_matching", statistics=some)


def test_refuses_mappings_that_do_not_fit() -> None:
    a, b, symmetries = mlp(WIDTHS, 0), mlp(WIDTHS, 1), mlp_table(WIDTHS)
    given: dict[Any, Any] = {**moments(a, b, some_inputs())}
    for wrong, message in (
        ({**given, "other": given["1.weight"]}, "the statistics name other, which the table lacks"),
        ({**given, "1.weight": given["2.weight"]}, r"the moments of 1.weight are \[\(10, 10\)"),
        ({"1.weight": given["1.weight"]}, "has no moments for p1"),
    ):
        with pytest.raises(PlanError, match=message):
            find_transform(b, a, "activation_matching", symmetries=symmetries, statistics=wrong)


@pytest.mark.parametrize("method", ["activation_matching", "ot"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", range(3))
def test_refuses_nan_in_statistics(method: str, wrong: float, place: int) -> None:
    a, b, symmetries = mlp(WIDTHS, 0), mlp(WIDTHS, 1), mlp_table(WIDTHS)
    given = moments(a, b, some_inputs())
    given["1.weight"][place].flatten()[3:4].fill_(wrong)
    with pytest.raises(FormatError, match=r"the moments of 1\.weight hold NaN or infinity"):
        find_transform(b, a, method, symmetries=symmetries, statistics=given)


@pytest.mark.parametrize(("method", "options"), [("activation_matching", {}), ("ot", {"cost": "squared"})])
def test_refuses_moments_whose_products_overflow(method: str, options: dict[str, str]) -> None:
    a, b, symmetries = mlp(WIDTHS, 0), mlp(WIDTHS, 1), mlp_table(WIDTHS)
    huge = {name: tuple(x * 1e307 for x in triple) for name, triple in moments(a, b, some_inputs()).items()}
    with pytest.raises(PlanError, match=r"the products .* of p0 .*overflow"):
        find_transform(b, a, method, symmetries=symmetries, statistics=huge, **options)  # type: ignore[arg-type]


def test_refuses_objects_that_do_not_map_to_triples() -> None:
    a, b, symmetries = mlp(WIDTHS, 0), mlp(WIDTHS, 1), mlp_table(WIDTHS)
    given: dict[Any, Any] = {**moments(a, b, some_inputs())}
    for wrong, message in (
        ({**given, "1.weight": given["1.weight"][:2]}, "the statistics of 1.weight are not three tensors"),
        ({**given, "1.weight": 1, "2.weight": "abc"}, "the statistics of 1.weight, 2.weight are not three tensors"),
        ({**given, "1.weight": [x.tolist() for x in given["1.weight"]]}, "the statistics of 1.weight are not three"),
        ({**given, 1: given["1.weight"]}, "the statistics name 1, which the table lacks"),
        ({**given, "0.bias": given["1.weight"]}, "the statistics name 0.bias, expected weights of layers"),
        ([given], "statistics: found a list, expected a file of cross moments"),
    ):
        with pytest.raises(PlanError, match=message):
            find_transform(b, a, "activation_matching", symmetries=symmetries, statistics=wrong)  # type: ignore[arg-type]


def test_channels_that_only_convolutions_read_have_no_statistics() -> None:
    model, symmetries = convolutions(0)
    tensors = model.state_dict()
    one = torch.eye(25)
    with pytest.raises(PlanError, match=r"has no moments for inside: .* use weight_matching"):
        find_transform(
            tensors,
            tensors,
            "activation_matching",
            symmetries=symmetries,
            statistics={"head.weight": (one, one.diagonal(), one.diagonal())},
        )


def test_products_are_those_of_states_divided_by_their_gains() -> None:
    """A state with gain 0 counts for nothing."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, 4, generator=generator, dtype=torch.float64) + i for i in range(2))
    gains = torch.tensor([2.0, 0.0, -0.5, 7.0]), torch.tensor([0.125, 3.0, 1.0, 0.0])
    means, powers = (x.mean(0), y.mean(0)), (x.square().mean(0), y.square().mean(0))
    block = UnitMoments(Part("units"), 1, x.T @ y / len(x), means, powers)
    u, v = (torch.where(gain == 0, 0.0, z / gain) for z, gain in zip((x, y), gains, strict=True))
    torch.testing.assert_close(block.product(gains), u.T @ v / (u.norm() * v.norm()))


@pytest.mark.parametrize(
    ("method", "options"),
    [("activation_matching", {}), ("ot", {}), ("ot", {"cost": "squared"}), ("ot", {"regularisation": 0.5})],
    ids=str,
)
@pytest.mark.parametrize("factor", [2.0**-20, 1e-6, 1e6])
def test_the_size_of_the_activations_does_not_matter(method: str, options: dict[str, Any], factor: float) -> None:
    a, b, symmetries = mlp(WIDTHS, 2), mlp(WIDTHS, 3), mlp_table(WIDTHS)
    given = moments(a, b, some_inputs())
    sized = {}
    for name, (cross, *powers) in given.items():
        sizes = [torch.cat([torch.full((len(x) - 1,), factor), torch.ones(1)]).double() for x in powers]
        sized[name] = (cross * sizes[0][:, None] * sizes[1], *(p * s * s for p, s in zip(powers, sizes, strict=True)))
    plain, found = (
        find_transform(b, a, method, symmetries=symmetries, statistics=x, **options) for x in (given, sized)
    )
    assert furthest(rewrite(b, found), rewrite(b, plain)) < 1e-6
