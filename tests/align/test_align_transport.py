"""Optimal transport of units: against the paper's algorithm in numpy, and the invariances of splitting units."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import ot
import pytest
import torch
from helpers_align import Tensors, convolutions, furthest, loaded, mlp, mlp_table, run_mlp, table_of, tensors_of
from numpy.typing import NDArray

from mergekit_lfm.align.find import find_transform
from mergekit_lfm.align.transport import cost_of, solve
from mergekit_lfm.artifacts.transform import UnitsElement, open_transform
from mergekit_lfm.errors import PlanError
from mergekit_lfm.views.rewritten import rewrite

A_WIDTHS, B_WIDTHS = (12, 9, 7, 5), (12, 11, 8, 5)
METRICS = {"euclidean": "euclidean", "squared": "sqeuclidean", "cosine": "cosine"}


def fuse(a: Tensors, b: Tensors, metric: str, regularisation: float) -> dict[str, NDArray[np.float64]]:
    """Algorithm 1 of 1910.05653: b's layers transported to a's, the last layer's units as they are.

    Readers are scaled by the source's width, not the other's, so that they add up what a unit is split into.
    """
    fused: dict[str, Any] = {}
    before, layers = np.eye(b["0.weight"].shape[1]), len(a)
    for i in range(layers):
        target, incoming = a[f"{i}.weight"].numpy(), b[f"{i}.weight"].numpy() @ before
        if i == layers - 1:
            return {**fused, f"{i}.weight": incoming}
        (m, n), cost = (len(target), len(incoming)), ot.dist(incoming, target, metric=METRICS[metric])
        alpha, beta = np.full(n, 1 / n), np.full(m, 1 / m)
        plan = (
            ot.sinkhorn(alpha, beta, cost, regularisation * cost.max(), numItermax=100_000, stopThr=1e-13)
            if regularisation
            else ot.emd(alpha, beta, cost)
        )
        fused[f"{i}.weight"] = (plan @ np.diag(1 / beta)).T @ incoming
        before = np.diag(1 / alpha) @ plan
    return fused


@pytest.mark.parametrize("regularisation", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("cost", METRICS)
@pytest.mark.parametrize("widths", [A_WIDTHS, B_WIDTHS])
def test_equals_the_paper(widths: tuple[int, ...], cost: str, regularisation: float) -> None:
    a, b = mlp(A_WIDTHS, 0, bias=False), mlp(widths, 1, bias=False)
    transform = find_transform(
        b,
        a,
        "ot",
        symmetries=table_of(b, widths),
        symmetries_to=table_of(a, A_WIDTHS),
        cost=cost,
        regularisation=regularisation,
    )
    found, expected = rewrite(b, transform), fuse(a, b, cost, regularisation)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert np.abs(found[name].numpy() - x).max() < 1e-7
    assert transform.info.exact == (widths == A_WIDTHS and not regularisation)


def doubled(tensors: Tensors) -> Tensors:
    """The same function with every hidden unit twice, each read with half the weight."""
    found, last = {}, len(A_WIDTHS) - 2
    for i in range(last + 1):
        w, bias = tensors[f"{i}.weight"], tensors[f"{i}.bias"]
        w = w if i == 0 else torch.cat([w, w], 1) / 2
        found[f"{i}.weight"] = w if i == last else torch.cat([w, w])
        found[f"{i}.bias"] = bias if i == last else torch.cat([bias, bias])
    return found


@pytest.mark.parametrize("metric", METRICS)
def test_units_that_were_split_come_together(metric: str) -> None:
    a = mlp(A_WIDTHS, 0)
    wide = doubled(a)
    widths = (12, 18, 14, 5)
    tables = {"symmetries": mlp_table(widths), "symmetries_to": mlp_table(A_WIDTHS)}
    found = rewrite(wide, find_transform(wide, a, "ot", cost=metric, **tables))
    assert all(x.shape == a[name].shape for name, x in found.items())
    assert furthest(found, a) < 1e-15


def test_units_that_are_split_leave_the_outputs_as_they_are() -> None:
    a = mlp(A_WIDTHS, 0)
    wide = doubled(a)
    tables = {"symmetries": mlp_table(A_WIDTHS), "symmetries_to": mlp_table((12, 18, 14, 5))}
    transform = find_transform(a, wide, "ot", **tables)
    found = rewrite(a, transform)
    inputs = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run_mlp(found, inputs), run_mlp(a, inputs), rtol=1e-12, atol=1e-12)
    assert all(x.shape == wide[name].shape for name, x in found.items())
    assert transform.info.scores["distance_after"] < 1e-20
    assert "distance_before" not in transform.info.scores


def test_a_model_is_transported_to_itself_unchanged() -> None:
    a, symmetries = mlp(A_WIDTHS, 0), mlp_table(A_WIDTHS)
    found = rewrite(a, find_transform(a, a, "ot", symmetries=symmetries))
    assert all(torch.equal(x, a[name]) for name, x in found.items())


def test_biases_are_another_column() -> None:
    a, symmetries = mlp(A_WIDTHS, 0), mlp_table(A_WIDTHS)
    for name in ("0.weight", "1.weight"):
        a[name] = a[name][:1].expand_as(a[name]).clone()  # only their biases tell units apart
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    b = {**a, "0.bias": a["0.bias"][order]}
    element = find_transform(b, a, "ot", symmetries=symmetries).elements["p0"]
    assert isinstance(element, UnitsElement) and element.order is not None
    assert torch.equal(element.order, order.argsort())


def test_activations_decide_where_they_are_given() -> None:
    a, b = mlp(A_WIDTHS, 0, bias=False), mlp(B_WIDTHS, 1, bias=False)
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 12, dtype=torch.float64, generator=draw)
    given, costs = {}, []
    x = y = inputs
    for i in range(3):
        padded = [torch.cat([z, torch.ones(50, 1, dtype=torch.float64)], 1) for z in (x, y)]
        given[f"{i}.weight"] = (
            padded[0].T @ padded[1] / 50,
            *(z.square().mean(0) for z in padded),
        )
        costs.append(torch.cdist(x.T, y.T).square().numpy() / 50)
        x, y = (x @ a[f"{i}.weight"].T).relu(), (y @ b[f"{i}.weight"].T).relu()
    transform = find_transform(
        b,
        a,
        "ot",
        symmetries=table_of(b, B_WIDTHS),
        symmetries_to=table_of(a, A_WIDTHS),
        statistics=given,  # type: ignore[arg-type]
        cost="squared",
    )
    for i, (m, n) in enumerate(((9, 11), (7, 8))):
        element = transform.elements[f"p{i}"]
        assert isinstance(element, UnitsElement) and element.matrix is not None
        plan = ot.emd(np.full(m, 1 / m), np.full(n, 1 / n), costs[i + 1])
        assert np.abs(element.matrix.numpy() - m * plan).max() < 1e-7


@pytest.mark.parametrize(("kind", "options"), [("llama", {"intermediate_size": 50}), ("gpt2", {"n_inner": 70})])
def test_wider_layers_of_networks_are_narrowed(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    a, b = loaded(kind, 0, tmp_path / "a"), loaded(kind, 1, tmp_path / "b", **options)
    transform = find_transform(b, a, "ot")
    assert {name: list(x.shape) for name, x in rewrite(tensors_of(b), transform).items()} == {
        name: list(spec.shape) for name, spec in a.items()
    }
    assert {name.rstrip("01") for name in transform.elements} == {"residual", "ffn."}
    transform.save(tmp_path / "found")
    assert open_transform(tmp_path / "found").info == transform.info


def test_heads_have_to_be_the_same(tmp_path: Path) -> None:
    a, b = loaded("llama", 0, tmp_path / "a"), loaded("llama", 1, tmp_path / "b", num_key_value_heads=4)
    with pytest.raises(PlanError, match=r"differ in shape:\n  group heads.0"):
        find_transform(b, a, "ot")


def test_convolutions_are_transported() -> None:
    (first, symmetries), (second, _) = convolutions(0), convolutions(1)
    a, b = first.state_dict(), second.state_dict()
    transform = find_transform(b, a, "ot", symmetries=symmetries)
    assert transform.info.scores["distance_after"] < transform.info.scores["distance_before"]
    assert furthest(rewrite(a, find_transform(a, a, "ot", symmetries=symmetries)), a) == 0


def test_groups_are_visited_in_the_given_order() -> None:
    a, b, symmetries = mlp(A_WIDTHS, 0), mlp(A_WIDTHS, 1), mlp_table(A_WIDTHS)
    by_default, given = (find_transform(b, a, "ot", symmetries=symmetries, order=o) for o in (None, ["p0", "p1"]))
    expected, found = (rewrite(b, transform) for transform in (by_default, given))
    assert all(torch.equal(x, expected[name]) for name, x in found.items())
    other = rewrite(b, find_transform(b, a, "ot", symmetries=symmetries, order=["p1", "p0"]))  # by its biases alone
    assert furthest(other, expected) > 0.1
    part = find_transform(b, a, "ot", symmetries=symmetries, order=["p1"])
    assert part.elements.keys() == {"p1"} and part.info.options["order"] == ["p1"]
    for wrong in (["p0", "p0"], [["p0"], ["p1"]]):
        with pytest.raises(PlanError, match=r"found the order p0.*p., expected one list of some of p0, p1, each once"):
            find_transform(b, a, "ot", symmetries=symmetries, order=wrong)
    wide, tables = mlp(B_WIDTHS, 1), {"symmetries": mlp_table(B_WIDTHS), "symmetries_to": symmetries}
    with pytest.raises(PlanError, match="p0 cannot be left out, because the widths differ"):
        find_transform(wide, a, "ot", order=["p1"], **tables)
    bare = [{name: x for name, x in tensors.items() if "bias" not in name} for tensors in (b, a)]
    with pytest.raises(PlanError, match="p1 comes before the groups that its weights read"):
        find_transform(bare[0], bare[1], "ot", symmetries=table_of(bare[0], A_WIDTHS), order=["p1", "p0"])


@pytest.mark.parametrize("metric", METRICS)
def test_units_that_are_equally_far_stay(metric: str) -> None:
    a, symmetries = mlp(A_WIDTHS, 0), mlp_table(A_WIDTHS)
    nothing = {name: torch.zeros_like(x) for name, x in a.items()}
    for source, to in ((a, nothing), (nothing, a), (nothing, nothing)):
        assert find_transform(source, to, "ot", symmetries=symmetries, cost=metric).elements == {}
    for n, value in ((7, 0.0), (40, 3.25)):
        plan = solve(torch.full((n, n), value, dtype=torch.float64), 0.0, "units")
        assert torch.equal(plan / n, torch.eye(n, dtype=torch.float64))


def test_the_tie_breaker_affects_ties_only() -> None:
    for seed in range(20):
        cost = torch.rand(30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        cost.fill_diagonal_(float(cost.max()))
        expected = ot.emd(np.ones(30), np.ones(30), cost.numpy())
        assert np.array_equal(solve(cost, 0.0, "units").numpy() / 30, expected)


@pytest.mark.parametrize("regularisation", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(6, 6), (5, 8), (9, 4)])
def test_plans_have_uniform_marginals(shape: tuple[int, int], regularisation: float) -> None:
    cost = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = solve(cost, regularisation, "units")
    plan = plan / plan.sum()
    assert bool((plan >= 0).all())
    assert torch.allclose(plan.sum(1), torch.full(shape[:1], 1 / shape[0], dtype=torch.float64), atol=1e-8)
    assert torch.allclose(plan.sum(0), torch.full(shape[1:], 1 / shape[1], dtype=torch.float64), atol=1e-8)


def test_entropy_that_is_too_small_is_refused() -> None:
    cost = torch.rand(30, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(PlanError, match=r"Sinkhorn's iteration for units has not converged .* Raise it"):
        solve(cost, 1e-5, "units", iterations=50)


@pytest.mark.parametrize("metric", METRICS)
def test_costs_are_those_of_the_reference(metric: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 7, dtype=torch.float64, generator=draw) for n in (5, 6))
    found = cost_of((x @ y.T, x.square().sum(1), y.square().sum(1)), metric)
    assert np.abs(found.numpy() - ot.dist(x.numpy(), y.numpy(), metric=METRICS[metric])).max() < 1e-12


def test_plans_are_whole_numbers_over_the_widths() -> None:
    """This makes factors of one exactly one, whatever the width."""
    for width, _ in pairwise((49, 93, 98, 10)):
        cost = 1 - torch.eye(width, dtype=torch.float64)
        plan = solve(cost, 0.0, "units")
        assert torch.equal(plan / plan.sum(1, keepdim=True), torch.eye(width, dtype=torch.float64))
