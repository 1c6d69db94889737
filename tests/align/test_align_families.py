"""The best element of each family: no other element is better, and heads are paired as by trying everything."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch
from helpers_align import loaded, mlp, mlp_table, table
from torch import Tensor

from mergekit_lfm.align.choices import (
    ChoiceKind,
    Family,
    MatchScores,
    assign,
    best_matrix,
    best_units,
    complete,
    polar,
    shorten,
    units_value,
)
from mergekit_lfm.align.elements import random_order, random_query_key, random_rotation, random_signs
from mergekit_lfm.align.heads import best_heads, heads_value
from mergekit_lfm.align.pair import Pair, Side
from mergekit_lfm.arch import Heads, Units
from mergekit_lfm.artifacts.transform import HeadsElement, UnitsElement
from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.tensors import TensorSpec

N = 6


def scores(n: int, seed: int) -> Tensor:
    return torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_element(kind: ChoiceKind, draw: torch.Generator) -> Tensor:
    """A random element of the kind, [N, N]."""
    one = torch.eye(N, dtype=torch.float64)
    if kind == "order":
        return one[random_order(N, draw)]
    if kind == "orthogonal":
        return random_rotation(N, draw)
    matrices = random_query_key(Heads(1, 1, N, "phases"), "signs" if kind == "signs" else "phases", draw)
    assert matrices is not None
    matrix = matrices[0]
    return matrix if kind == "signs" else polar(matrix)


@pytest.mark.parametrize("kind", ["order", "orthogonal", "phases", "signs"])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_of_the_family_is_better(kind: ChoiceKind, seed: int) -> None:
    c, draw = scores(N, seed), torch.Generator().manual_seed(seed)
    found = best_matrix(kind, c)
    reached = float((c * found).sum())
    assert torch.allclose(found @ found.T, torch.eye(N, dtype=torch.float64), atol=1e-12)
    others = [random_element(kind, draw) for _ in range(200)]
    assert all(float((c * other).sum()) < reached + 1e-12 for other in others)
    # each is the best for itself, so that the family is the same
    assert all(torch.allclose(best_matrix(kind, other), other, atol=1e-10) for other in others[:20])


def test_signed_orders_are_the_best() -> None:
    group, family = Units(4, "nonzero"), Family("signed")
    for seed in range(5):
        found = MatchScores({"plain": scores(4, seed), "vector": scores(4, seed + 50)})
        element = best_units(group, family, found)
        tried = [
            UnitsElement(torch.tensor(order), torch.tensor(signs, dtype=torch.float64))
            for order in permutations(range(4))
            for signs in product((1.0, -1.0), repeat=4)
        ]
        assert units_value(group, found, element) == pytest.approx(max(units_value(group, found, t) for t in tried))


def heads_scores(group: Heads, seed: int) -> MatchScores:
    return MatchScores(
        {view: scores(group.size(view), seed + i) for i, view in enumerate(("query", "key", "value", "output"))}
    )


def every_element(group: Heads) -> list[HeadsElement]:
    """All permutations of heads, of query heads, and inside."""
    one = torch.eye(group.head_dim, dtype=torch.float64)
    inner = [one[list(order)] for order in permutations(range(group.head_dim))]
    queries = [torch.tensor(order) for order in permutations(range(group.per_group))]
    return [
        HeadsElement(torch.tensor(groups), torch.stack(q), torch.stack(qk), torch.stack(vo))
        for groups in permutations(range(group.groups))
        for q in product(queries, repeat=group.groups)
        for qk in product(inner, repeat=group.groups)
        for vo in product(inner, repeat=group.groups)
    ]


@pytest.mark.parametrize(("per_group", "least"), [(1, 1.0), (2, 0.95)])
def test_heads_are_paired_as_by_trying_everything(per_group: int, least: float) -> None:
    """Exact with one query head per head; with several, query heads and matrices take turns, which may stop early."""
    group, family = Heads(2, per_group, 2, "linear"), Family(query_key="order")
    exact = 0
    for seed in range(0, 40, 4):
        found = heads_scores(group, seed)
        now = complete(group, family, None, "heads")
        assert isinstance(now, HeadsElement)
        reached = heads_value(group, found, best_heads(group, family, found, now))
        most = max(heads_value(group, found, element) for element in every_element(group))
        assert least * most - 1e-9 <= reached <= most + 1e-9
        exact += reached > most - 1e-9
    assert exact >= 7


@pytest.mark.parametrize("query_key", ["phases", "signs", "orthogonal"])
def test_heads_are_never_made_worse(query_key: ChoiceKind) -> None:
    group, family = Heads(3, 3, 4, "phases"), Family(query_key=query_key, value_output="orthogonal")
    now = complete(group, family, None, "heads")
    for seed in range(0, 60, 4):
        assert isinstance(now, HeadsElement)
        found = heads_scores(group, seed)
        better = best_heads(group, family, found, now)
        assert heads_value(group, found, better) >= heads_value(group, found, now)
        assert heads_value(group, found, best_heads(group, family, found, better)) >= heads_value(group, found, better)
        now = better


def test_ties_and_zeros_leave_matrices_as_they_are() -> None:
    zero = torch.zeros(N, N, dtype=torch.float64)
    for kind in ("fixed", "order", "phases", "signs"):
        assert torch.equal(best_matrix(kind, zero), torch.eye(N, dtype=torch.float64))
    assert torch.equal(assign(torch.eye(N, dtype=torch.float64)), torch.arange(N))


def test_of_equal_orders_the_present_one_is_kept() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        now = random_order(N, draw)
        assert torch.equal(assign(torch.zeros(N, N, dtype=torch.float64), now), now)
        dead = torch.randperm(N, generator=draw)[: N // 2]
        c = torch.eye(N, dtype=torch.float64)[now]
        c[dead] = 0
        c[:, now[dead]] = 0
        assert torch.equal(assign(c, now), now)
        found = best_units(Units(N), Family(), MatchScores({"plain": c}), UnitsElement(now))
        assert found.order is not None and torch.equal(found.order, now)


def test_completing_and_shortening_are_inverse() -> None:
    draw = torch.Generator().manual_seed(0)
    units, heads = Units(N, "sign"), Heads(2, 2, N, "signs")
    signed = UnitsElement(random_order(N, draw), random_signs((N,), draw))
    assert shorten(complete(units, Family("signed"), None, "u")) is None
    assert shorten(complete(heads, Family(), None, "h")) is None
    again = shorten(complete(units, Family("signed"), signed, "u"))
    assert isinstance(again, UnitsElement) and again.order is not None and again.scale is not None
    assert torch.equal(again.order, signed.order) and torch.equal(again.scale, signed.scale)  # type: ignore[arg-type]
    rotated = complete(units, Family("orthogonal"), signed, "u")
    assert isinstance(rotated, UnitsElement) and rotated.matrix is not None
    assert torch.equal(rotated.matrix @ torch.arange(N).double(), signed.scale * signed.order)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("family", "element"),
    [
        (Family("order"), UnitsElement(scale=-torch.ones(N))),
        (Family("signed"), UnitsElement(scale=torch.full((N,), 2.0))),
        (Family("signed"), UnitsElement(matrix=torch.eye(N))),
        (Family("orthogonal"), UnitsElement(matrix=2 * torch.eye(N))),
        (Family("orthogonal"), UnitsElement(matrix=torch.ones(2, N))),
    ],
)
def test_elements_beyond_the_family_are_refused(family: Family, element: UnitsElement) -> None:
    with pytest.raises(PlanError, match="`initial` transforms units"):
        complete(Units(N), family, element, "units")


def test_groups_are_anchored_where_the_rest_is_known(tmp_path) -> None:  # type: ignore[no-untyped-def]
    widths = (7, 12, 9, 10, 4)
    tensors, symmetries = mlp(widths, 0), mlp_table(widths)
    specs = {n: TensorSpec(n, tuple(x.shape), "float64") for n, x in tensors.items()}
    side = Side("mlp", specs, tensors)

    def in_order(run, items):  # type: ignore[no-untyped-def]
        return map(run, items)

    visits = list(Pair(side, side, symmetries, symmetries, in_order).anchored(symmetries.groups))
    assert [name for name, _ in visits] == ["p0", "p1", "p2"]
    assert visits[0][1] == [("0.weight", 0), ("0.bias", 0)]
    assert visits[2][1] == [("2.weight", 0), ("2.bias", 0), ("3.weight", 1)]
    llama = loaded("llama", 0, tmp_path)
    side, symmetries = Side("llama", llama, llama), table(llama)
    name, uses = next(Pair(side, side, symmetries, symmetries, in_order).anchored(symmetries.groups))
    assert name == "residual"
    assert [tensor for tensor, _ in uses if "norm" not in tensor] == ["model.embed_tokens.weight", "lm_head.weight"]
