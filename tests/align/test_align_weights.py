"""Weight matching and rotation: against a plain git-re-basin, and properties that hold for any two models."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_align import furthest, loaded, mlp, mlp_table, planted, run_mlp, table, tensors_of
from scipy.optimize import linear_sum_assignment

from mergekit_lfm.align.find import find_transform
from mergekit_lfm.align.gains import new_gains
from mergekit_lfm.align.pair import Pair, Side, one_thread_each
from mergekit_lfm.align.request import AlignProblem
from mergekit_lfm.arch import Symmetries, Units, read_table
from mergekit_lfm.artifacts.transform import Transform, TransformInfo, UnitsElement, open_transform
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.recipe.align import align_options
from mergekit_lfm.recipe.registry import ALIGN_METHODS
from mergekit_lfm.store.identity import spec_of
from mergekit_lfm.views.rewritten import rewrite

WIDTHS = (7, 12, 9, 10, 4)
Tensors = dict[str, torch.Tensor]


def two_mlps(seed: int) -> tuple[Tensors, Tensors, Symmetries]:
    return mlp(WIDTHS, seed), mlp(WIDTHS, seed + 100), mlp_table(WIDTHS)


def orders_of(transform: Transform, groups: Sequence[str]) -> list[list[int]]:
    """The permutation of every group."""
    found = []
    for name in groups:
        element = transform.elements.get(name)
        group = transform.symmetries.groups[name]
        assert isinstance(group, Units)
        moved = isinstance(element, UnitsElement) and element.order is not None
        found.append(element.order.tolist() if moved else list(range(group.count)))  # type: ignore[union-attr]
    return found


def git_re_basin(a: Tensors, b: Tensors, orders: Sequence[Sequence[int]]) -> list[list[int]]:
    """Algorithm 1 of 2209.04836 for an MLP, in numpy."""
    last = len(WIDTHS) - 2
    wa, wb = ([x[f"{i}.weight"].numpy() for i in range(last + 1)] for x in (a, b))
    ba, bb = ([x[f"{i}.bias"].numpy() for i in range(last + 1)] for x in (a, b))
    p = [np.arange(n) for n in WIDTHS]  # p[i] permutes the inputs of layer i
    for order in orders:
        grew = False
        for i in order:  # the units between layers i and i + 1
            c = wa[i] @ wb[i][:, p[i]].T + np.outer(ba[i], bb[i]) + wa[i + 1].T @ wb[i + 1][p[i + 2]]
            new = linear_sum_assignment(c, maximize=True)[1]
            grew |= c[range(len(new)), new].sum() > c[range(len(new)), p[i + 1]].sum() + 1e-12
            p[i + 1] = new
        if not grew:
            break
    return [q.tolist() for q in p[1:-1]]


@pytest.mark.parametrize("seed", range(6))
def test_equals_git_re_basin_in_the_same_order(seed: int) -> None:
    a, b, symmetries = two_mlps(seed)
    draw = random.Random(seed)
    orders = [draw.sample(range(3), 3) for _ in range(100)]
    names = [[f"p{i}" for i in order] for order in orders]
    transform = find_transform(b, a, symmetries=symmetries, order=names, restarts=1)
    assert orders_of(transform, ("p0", "p1", "p2")) == git_re_basin(a, b, orders)


def test_one_order_is_that_of_every_sweep() -> None:
    a, b, symmetries = two_mlps(1)
    transform = find_transform(b, a, symmetries=symmetries, order=["p2", "p0", "p1"], restarts=1)
    assert orders_of(transform, ("p0", "p1", "p2")) == git_re_basin(a, b, [[2, 0, 1]] * 100)


def test_groups_outside_of_the_order_stay() -> None:
    a, b, symmetries = two_mlps(2)
    transform = find_transform(b, a, symmetries=symmetries, order=["p1"], restarts=1)
    assert transform.elements.keys() == {"p1"}


@pytest.mark.parametrize("restarts", [1, 2, 5])
def test_no_run_visits_groups_that_the_order_leaves_out(restarts: int) -> None:
    a, b, symmetries = two_mlps(2)
    found = find_transform(b, a, symmetries=symmetries, order=iter(["p2", "p0"]), restarts=restarts)
    assert found.elements.keys() == {"p0", "p2"}
    assert found.info.options["order"] == ["p2", "p0"]


def test_orders_may_be_iterators() -> None:
    a, b, symmetries = two_mlps(1)
    names = ["p2", "p0", "p1"]
    expected = find_transform(b, a, symmetries=symmetries, order=[names, names[::-1]], restarts=1)
    found = find_transform(b, a, symmetries=symmetries, order=map(iter, (names, names[::-1])), restarts=1)  # type: ignore[arg-type]
    assert orders_of(found, names) == orders_of(expected, names)
    assert found.info.options == expected.info.options
    refused("order: found 5, expected names of groups", b, a, symmetries=symmetries, order=5)
    refused("order: found '1', did you mean p1", b, a, symmetries=symmetries, order=[1])


def distance(a: Tensors, b: Tensors) -> float:
    return float(sum((a[name].double() - b[name].double()).square().sum() for name in a))


def test_scores_are_the_distance_of_the_models() -> None:
    a, b, symmetries = two_mlps(3)
    transform = find_transform(b, a, symmetries=symmetries)
    scores = transform.info.scores
    assert scores["distance_before"] == pytest.approx(distance(a, b))
    assert scores["distance_after"] == pytest.approx(distance(a, rewrite(b, transform)))
    products = {name: float((a[name] * rewrite(b, transform)[name]).sum()) for name in a}
    assert scores["inner_after"] == pytest.approx(sum(products.values()))
    assert scores["inner_after"] > scores["inner_before"]


@pytest.mark.parametrize("method", ["weight_matching", "rotation"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_every_visit_makes_the_sum_greater(method: str, kind: str, tmp_path: Path) -> None:
    a, b = (loaded(kind, seed, tmp_path / str(seed)) for seed in range(2))
    groups = list(table(a).groups)
    reached: list[Any] = []
    for visits in range(1, len(groups) + 1):
        scores = find_transform(b, a, method, restarts=1, order=[groups[:visits]]).info.scores
        reached += [scores["inner_after"]] if reached else [scores["inner_before"], scores["inner_after"]]
    assert all(after > before for before, after in pairwise(reached))


def test_more_sweeps_are_never_worse() -> None:
    a, b, symmetries = two_mlps(4)
    reached = [
        find_transform(b, a, symmetries=symmetries, order=["p0", "p1", "p2"], restarts=1, sweeps=n) for n in range(1, 8)
    ]
    sums = [transform.info.scores["inner_after"] for transform in reached]
    assert sums == sorted(sums) and sums[0] < sums[-1]


def test_a_group_on_both_axes_of_a_tensor_never_makes_it_worse() -> None:
    symmetries = read_table("inner skip skip'\nlast class skip'", {"skip": Units(9)}, ["inner", "last"])
    for seed in range(10):
        draw = torch.Generator().manual_seed(seed)
        a, b = (
            {"inner": torch.randn(9, 9, generator=draw), "last": torch.randn(3, 9, generator=draw)} for _ in range(2)
        )
        scores = find_transform(b, a, symmetries=symmetries, restarts=3).info.scores
        assert scores["inner_after"] >= scores["inner_before"]
        plant = planted(a, symmetries, seed)
        found = find_transform(rewrite(a, plant), a, symmetries=symmetries, restarts=1)
        assert furthest(rewrite(rewrite(a, plant), found), a) == 0


def test_restarts_keep_the_best() -> None:
    gained = 0
    for seed in range(4):
        a, b, symmetries = two_mlps(seed)
        sums = [
            find_transform(b, a, symmetries=symmetries, restarts=n).info.scores["inner_after"] for n in (1, 2, 4, 8)
        ]
        assert sums == sorted(sums)
        gained += sums[-1] > sums[0]
    assert gained


def test_the_seed_decides_the_orders() -> None:
    a, b, symmetries = two_mlps(6)
    start = Transform(symmetries, {}, TransformInfo("none"))

    def found(seed: int) -> list[list[int]]:
        transform = find_transform(b, a, symmetries=symmetries, restarts=1, seed=seed, initial=start)
        return orders_of(transform, ("p0", "p1", "p2"))

    assert found(3) == found(3)
    assert len({str(found(seed)) for seed in range(8)}) > 1


def test_starts_from_the_initial_transform() -> None:
    a, symmetries = mlp(WIDTHS, 7), mlp_table(WIDTHS)
    plant = planted(a, symmetries, 7)
    b = rewrite(a, plant)
    back = find_transform(b, a, symmetries=symmetries)
    orders = {name: element.order for name, element in back.elements.items() if isinstance(element, UnitsElement)}
    for visited in ("p0", "p2"):  # one visit finds its group if the others are right, and leaves them
        start = {name: UnitsElement(order) for name, order in orders.items() if name != visited}
        initial = Transform(symmetries, start, TransformInfo("part"))
        found = find_transform(b, a, symmetries=symmetries, initial=initial, order=[visited], sweeps=1, restarts=1)
        assert all(torch.equal(x, a[name]) for name, x in rewrite(b, found).items())
        assert found.info.options["initial"] == "part"


def folded_product(a: Tensors, b: Tensors) -> float:
    """The inner product of two Llamas whose gains are folded into the weights that read the norms."""
    total = 0.0
    for name, x in a.items():
        layer = name.partition(".self_attn")[0].partition(".mlp")[0]
        gain = (
            f"{layer}.input_layernorm.weight"
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
            else f"{layer}.post_attention_layernorm.weight"
            if name.endswith(("gate_proj.weight", "up_proj.weight"))
            else "model.norm.weight"
            if name == "lm_head.weight"
            else None
        )
        if "norm" not in name:
            factor = 1 if gain is None else a[gain].double() * b[gain].double()
            total += float((x.double() * b[name].double() * factor).sum())
    return total


def test_rotation_goes_on_from_permutations_and_from_rotations(tmp_path: Path) -> None:
    a, b = (loaded("llama", seed, tmp_path / str(seed)) for seed in range(2))
    first = find_transform(b, a, restarts=2)
    second = find_transform(b, a, "rotation", restarts=1, sweeps=3, initial=first)
    third = find_transform(b, a, "rotation", restarts=1, sweeps=3, initial=second)
    sums = [folded_product(tensors_of(a), rewrite(tensors_of(b), transform)) for transform in (first, second, third)]
    assert sums[0] < sums[1] < sums[2]
    assert [t.info.scores["inner_after"] for t in (second, third)] == pytest.approx(sums[1:], rel=1e-5)
    with pytest.raises(PlanError, match="`initial` transforms residual"):
        find_transform(b, a, initial=second)


@pytest.mark.parametrize("method", ["weight_matching", "rotation"])
def test_the_number_of_threads_does_not_change_the_file(method: str, tmp_path: Path) -> None:
    a, b = (loaded("llama", seed, tmp_path / str(seed)) for seed in range(2))
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            find_transform(b, a, method, restarts=2, sweeps=5).save(tmp_path / f"{threads}.safetensors")
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    first, *others = (tmp_path / f"{threads}.safetensors" for threads in (1, 2, 3))
    assert all(other.read_bytes() == first.read_bytes() for other in others)


@pytest.mark.parametrize("method", ["weight_matching", "rotation"])
def test_reading_by_rows_finds_the_same(method: str, tmp_path: Path) -> None:
    original = loaded("llama", 0, tmp_path, torch.float64)
    symmetries, tensors = table(original), tensors_of(original)
    moved = rewrite(tensors, planted(tensors, symmetries, 1, rotate=method == "rotation"))
    source, to = (Side("mine", {n: spec_of(n, x) for n, x in model.items()}, model) for model in (moved, tensors))
    with one_thread_each() as in_order:
        pair = Pair(source, to, symmetries, symmetries, in_order, read_at_once=100)
        options = align_options(method, {"restarts": 1}, statistics=False)
        aligned = ALIGN_METHODS[method].find(AlignProblem(pair, options))
        transform = Transform(symmetries, aligned.elements, TransformInfo(method), new_gains(aligned))
    assert furthest(rewrite(moved, transform), tensors) < 1e-10


def test_files_and_tensors_give_the_same(tmp_path: Path) -> None:
    a, b = (loaded("llama", seed, tmp_path / str(seed), torch.bfloat16) for seed in range(2))
    of_files = find_transform(tmp_path / "1", str(tmp_path / "0"), restarts=1)
    of_tensors = find_transform(tensors_of(b), tensors_of(a), symmetries=table(a), restarts=1)
    expected, found = (rewrite(tensors_of(b), transform) for transform in (of_files, of_tensors))
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    assert of_files.info.models == (b.content, a.content)
    assert of_tensors.info.models == ()
    assert of_files.info.options == {"restarts": 1, "sweeps": 100, "seed": 0, "normalise": False}
    assert of_files.info.versions.keys() == {"mergekit_lfm", "torch", "numpy", "scipy", "pot"}


def test_the_file_holds_the_result(tmp_path: Path) -> None:
    a, b = (loaded("llama", seed, tmp_path / str(seed)) for seed in range(2))
    transform = find_transform(b, a, "rotation", restarts=1, sweeps=2)
    transform.save(tmp_path / "found.safetensors")
    stored = open_transform(tmp_path / "found.safetensors")
    assert stored.info == transform.info
    assert stored.symmetries == transform.symmetries
    expected, found = (rewrite(tensors_of(b), t) for t in (transform, stored))
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_a_model_is_near_itself() -> None:
    a, symmetries = mlp(WIDTHS, 0), mlp_table(WIDTHS)
    transform = find_transform(a, a, symmetries=symmetries)
    assert transform.elements == {}
    assert transform.info.scores["distance_after"] == 0


def test_progress_counts_visits() -> None:
    a, b, symmetries = two_mlps(0)
    visits: list[int] = []
    find_transform(b, a, symmetries=symmetries, restarts=1, order=["p0", "p1", "p2"], sweeps=1, progress=visits.append)
    assert visits == [1, 1, 1]


def test_outputs_stay() -> None:
    a, b, symmetries = two_mlps(8)
    inputs = torch.randn(20, WIDTHS[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = rewrite(b, find_transform(b, a, symmetries=symmetries))
    assert furthest(found, b) > 0.1
    torch.testing.assert_close(run_mlp(found, inputs), run_mlp(b, inputs), rtol=1e-12, atol=1e-12)


def refused(message: str, source: Any, to: Any, method: str = "weight_matching", **given: Any) -> None:
    with pytest.raises(PlanError, match=message):
        find_transform(source, to, method, **given)


def test_refuses_models_that_do_not_fit(tmp_path: Path) -> None:
    a, b, symmetries = two_mlps(0)
    llama, wider = loaded("llama", 0, tmp_path / "a"), loaded("llama", 0, tmp_path / "b", intermediate_size=48)
    gpt2 = loaded("gpt2", 0, tmp_path / "c")
    refused("the source is given as tensors", b, a)
    refused("does not fit the symmetry table", b, mlp((7, 12, 8, 10, 4), 0), symmetries=symmetries)
    refused("differ in shape:\n  group ffn.0", llama, wider)
    refused("differ in shape:\n  .* is in one table only", llama, gpt2)
    refused(
        "unknown method 'weight_maching', did you mean weight_matching", b, a, "weight_maching", symmetries=symmetries
    )
    refused("order: found 'p3', known here: p0, p1, p2", b, a, symmetries=symmetries, order=["p3"])
    refused("order: found a sweep without groups", b, a, symmetries=symmetries, order=[])
    other = Transform(mlp_table((7, 12, 9, 11, 4)), {}, TransformInfo("none"))
    refused("`initial` is under another table", b, a, symmetries=symmetries, initial=other)
    refused("has attention heads without rotary positions", gpt2, gpt2, "rotation")
    refused("has no attention heads", b, a, "rotation", symmetries=symmetries)
    refused("restarts: found 0", b, a, symmetries=symmetries, restarts=0)
    refused("weight_matching reads no statistics", b, a, symmetries=symmetries, statistics={})


def test_refuses_other_sizes_of_free_axes() -> None:
    symmetries = read_table("w units input", {"units": Units(3)}, ["w"])
    refused("differ in shape", {"w": torch.ones(3, 2)}, {"w": torch.ones(3, 4)}, symmetries=symmetries)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e25), (torch.bfloat16, 1e25), (torch.float64, 1e200)])
def test_refuses_products_that_overflow(dtype: torch.dtype, size: float, normalise: bool) -> None:
    a, b, symmetries = two_mlps(0)
    a, b = ({name: (x * size).to(dtype) for name, x in tensors.items()} for tensors in (a, b))
    if normalise and dtype != torch.float64:  # what is divided first has room
        scores = find_transform(b, a, symmetries=symmetries, normalise=True).info.scores
        assert scores["inner_after"] > scores["inner_before"]
    else:
        refused("overflow, expected finite products", b, a, symmetries=symmetries, normalise=normalise)
    if dtype == torch.float64:
        refused("overflow, expected finite products", b, a, "ot", symmetries=symmetries)


def test_refuses_gains_that_overflow_and_those_that_are_nan(tmp_path: Path) -> None:
    llama = loaded("llama", 0, tmp_path / "a")
    gain = "model.layers.1.input_layernorm.weight"
    for value, error, message in (
        (1e38, PlanError, r"the products of model\.layers\.1\..* with the gains of the norm that it reads overflow"),
        (float("nan"), FormatError, rf"{gain} of the source holds NaN or infinity"),
    ):
        tensors = tensors_of(llama)
        tensors = {n: x * 1e20 if "layers.1.self_attn.q_proj" in n else x for n, x in tensors.items()}
        tensors[gain] = torch.full_like(tensors[gain], value)
        with pytest.raises(error, match=message):
            find_transform(tensors, llama, "rotation", symmetries=table(llama), symmetries_to=table(llama))


def test_refuses_nan() -> None:
    a, b, symmetries = two_mlps(0)
    b["1.weight"][0, 0] = torch.nan
    with pytest.raises(FormatError, match=r"1.weight of the source holds NaN or infinity"):
        find_transform(b, a, symmetries=symmetries)
    assert torch.get_num_threads() >= 1


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("weight_matching", {"restarts": 2}),
    ("weight_matching", {"restarts": 2, "normalise": True}),
    ("ot", {}),
    ("ot", {"cost": "squared"}),
    ("ot", {"cost": "cosine"}),
    ("ot", {"regularisation": 0.1}),
]


@pytest.mark.parametrize(("method", "options"), VARIANTS, ids=str)
@pytest.mark.parametrize("factor", [2.0**-40, 1e-6, 1e6, 2.0**40])
def test_the_size_of_the_weights_does_not_matter(method: str, options: dict[str, Any], factor: float) -> None:
    a, b, symmetries = two_mlps(3)
    plain = find_transform(b, a, method, symmetries=symmetries, **options)
    sized = [{name: x * factor for name, x in model.items()} for model in (b, a)]
    found = find_transform(*sized, method, symmetries=symmetries, **options)
    assert furthest(rewrite(b, found), rewrite(b, plain)) < 1e-6
