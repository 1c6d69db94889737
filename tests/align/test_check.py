"""The check of a symmetry table finds wrong tables; its random elements are what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from helpers_arch import Subject, tiny
from torch import Tensor

from mergekit_lfm.align.check import CHANGED, UNCHANGED, Report, check_symmetries
from mergekit_lfm.align.elements import random_gains, random_rotation, random_transform
from mergekit_lfm.arch import find_symmetries, read_table
from mergekit_lfm.arch.table import Group, Heads, Part, Symmetries, Units
from mergekit_lfm.artifacts.transform import HeadsElement, Transform, UnitsElement, check_elements, open_transform
from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.checkpoint import open_checkpoint
from mergekit_lfm.views.rewritten import rewrite


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Subject, Symmetries]]:
    """A tiny model with its table, made once."""
    made: dict[str, tuple[Subject, Symmetries]] = {}

    def subject(name: str) -> tuple[Subject, Symmetries]:
        if name not in made:
            found = tiny(name, tmp_path_factory.mktemp(name))
            made[name] = found, find_symmetries(open_checkpoint(found.folder))
        return made[name]

    return subject


Subjects = Callable[[str], tuple[Subject, Symmetries]]


def with_group(table: Symmetries, name: str, **fields: object) -> Symmetries:
    """The table with groups of this kind declared differently."""
    groups = {n: replace(g, **fields) if n.startswith(name) else g for n, g in table.groups.items()}
    return Symmetries(groups, table.tensors)


def with_part(table: Symmetries, tensor: str, axis: int, change: Callable[[Part], Part]) -> Symmetries:
    """The table with another part on an axis of all tensors of this kind."""
    tensors = {
        name: tuple(tuple(map(change, parts)) if i == axis else parts for i, parts in enumerate(axes))
        if name.endswith(tensor)
        else axes
        for name, axes in table.tensors.items()
    }
    return Symmetries(table.groups, tensors)


def free(_: Part) -> Part:
    return Part(None, free="class")


def viewed(view: str) -> Callable[[Part], Part]:
    return lambda part: replace(part, view=view)


def normless(part: Part) -> Part:
    return replace(part, norm=None)


# (the mistake, the model, the wrong table, and a row that has to name it)
TOO_LARGE = [
    ("gpt2", lambda t: with_group(t, "residual", scale="sign"), "residual scale"),
    ("gpt2", lambda t: with_group(t, "residual", rotation="centred"), "residual rotation"),
    ("gpt2", lambda t: with_group(t, "ffn", scale="positive"), "ffn.* scale"),
    ("gpt2-untied", lambda t: with_group(t, "residual", rotation="orthogonal"), "residual rotation"),
    ("bert", lambda t: with_group(t, "residual", scale="sign"), "residual scale"),
    ("bert-classifier", lambda t: with_group(t, "pooler", scale="positive"), "pooler scale"),
    ("llama", lambda t: with_group(t, "heads", query_key="linear"), "heads.* inside"),
    ("llama-tied", lambda t: with_group(t, "residual", scale="positive"), "residual scale"),
    ("llama-tied", lambda t: with_group(t, "residual", rotation="orthogonal"), "residual rotation"),
    ("qwen3", lambda t: with_group(t, "heads", query_key="phases"), "heads.* inside"),
    ("gpt-j", lambda t: with_group(t, "heads", query_key="signs"), "heads.* inside"),
    ("resnet-basic", lambda t: with_group(t, "stages", scale="nonzero"), "stages.*.layers.*.* scale"),
    ("resnet-gelu", lambda t: with_group(t, "stem", scale="positive"), "stem scale"),
    # an axis that is not named, or in the wrong view
    ("llama", lambda t: with_part(t, "embed_tokens.weight", 1, free), "residual order"),
    ("llama", lambda t: with_part(t, "up_proj.weight", 0, free), "ffn.* order"),
    ("llama", lambda t: with_part(t, "gate_proj.weight", 0, viewed("")), "ffn.* scale"),
    ("llama", lambda t: with_part(t, "down_proj.weight", 1, viewed("")), "ffn.* scale"),
    ("llama", lambda t: with_part(t, "o_proj.weight", 1, viewed("query")), "heads.* inside"),
    ("llama", lambda t: with_part(t, "mlp.gate_proj.weight", 1, normless), "residual rotation"),
    ("gpt2-untied", lambda t: with_part(t, "ln_f.bias", 0, viewed("")), "residual rotation"),
    ("gpt2-untied", lambda t: with_part(t, "wpe.weight", 1, free), "residual order"),
    ("resnet-basic", lambda t: with_part(t, "running_mean", 0, free), "stem order"),
    ("resnet-basic", lambda t: with_part(t, "embedder.convolution.weight", 0, viewed("")), "stem scale"),
    ("resnet-basic", lambda t: with_part(t, "running_var", 0, viewed("")), "stages.* scale"),
]


@pytest.mark.parametrize(("model", "change", "what"), TOO_LARGE, ids=lambda x: x if isinstance(x, str) else "")
def test_a_table_that_claims_too_much_is_found_out(
    model: str, change: Callable[[Symmetries], Symmetries], what: str, subjects: Subjects
) -> None:
    subject, table = subjects(model)
    report = check_symmetries(subject.tensors, change(table), subject.run)
    wrong = {row.what: row for row in report.rows if row.part == "kept" and not row.ok}
    assert not report.ok
    assert {what, "all at once"} <= set(wrong)
    assert wrong[what].difference > CHANGED


TOO_SMALL = [
    ("gpt2-untied", lambda t: with_group(t, "residual", rotation=None), None),
    ("gpt2-relu", lambda t: with_group(t, "ffn", scale=None), None),  # factors of any sign are too many here too
    ("qwen2", lambda t: with_group(t, "heads", query_key="signs"), "heads.* phases inside"),
    ("llama", lambda t: with_group(t, "residual", rotation="centred"), "residual any rotation"),
    ("llama", lambda t: with_group(t, "residual", rotation=None), "residual any rotation"),
    ("llama", lambda t: with_group(t, "ffn", scale="positive"), "ffn.* factors that are not in the table"),
    ("llama", lambda t: with_group(t, "ffn", scale=None), "ffn.* factors that are not in the table"),
    ("llama-mha", lambda t: with_group(t, "ffn", scale="sign"), "ffn.* factors that are not in the table"),
]


@pytest.mark.parametrize(("model", "change", "what"), TOO_SMALL, ids=lambda x: x if isinstance(x, str) else "")
def test_a_table_that_claims_too_little_is_found_out(
    model: str, change: Callable[[Symmetries], Symmetries], what: str | None, subjects: Subjects
) -> None:
    subject, table = subjects(model)
    report = check_symmetries(subject.tensors, change(table), subject.run)
    assert [row.what for row in report.rows if not row.ok] == ([what] if what else [])
    assert all(row.part == "enough" for row in report.rows if not row.ok)


def test_an_axis_that_need_not_be_named_is_found(subjects: Subjects) -> None:
    """Unused tokens could have places in a group of their own; the table need not name that axis."""
    subject, table = subjects("llama")
    groups: dict[str, Group] = {**table.groups, "rows": Units(30)}
    tensors = dict(table.tensors)
    tensors["model.embed_tokens.weight"] = ((Part("rows"),), (Part("residual"),))
    report = check_symmetries(subject.tensors, Symmetries(groups, tensors), subject.run)
    assert {"rows order", "all at once"} <= {row.what for row in report.rows if not row.ok}


# A model in a few lines: two layers, and a third that reads the second's outputs and may be left out of the outputs.
TABLE = """
first.weight   one  input
first.bias     one
second.weight  class  one'
aside.weight   two  input
aside.bias     two
ahead.weight   class  two'
"""
GROUPS: dict[str, Group] = {"one": Units(6), "two": Units(6)}


def two_paths(dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], Symmetries]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"first.weight": (6, 4), "first.bias": (6,), "second.weight": (3, 6)}
    shapes |= {"aside.weight": (6, 4), "aside.bias": (6,), "ahead.weight": (3, 6)}
    tensors = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    return tensors, read_table(TABLE, GROUPS, shapes)


def run_first(t: Mapping[str, Tensor]) -> Tensor:
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(1)).to(t["first.weight"].dtype)
    return (x @ t["first.weight"].T + t["first.bias"]).relu() @ t["second.weight"].T


def run_both(t: Mapping[str, Tensor]) -> Tensor:
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(1)).to(t["first.weight"].dtype)
    return run_first(t) + (x @ t["aside.weight"].T + t["aside.bias"]).tanh() @ t["ahead.weight"].T


def test_tensors_that_the_outputs_do_not_depend_on_are_named() -> None:
    tensors, table = two_paths()
    assert not [row for row in check_symmetries(tensors, table, run_both).rows if row.reason]
    report = check_symmetries(tensors, table, run_first)
    unread = [row for row in report.rows if row.reason]
    assert report.ok
    assert {row.what for row in unread} == {
        "aside.weight axis 0, two",
        "aside.bias axis 0, two",
        "ahead.weight axis 1, two'",
        "two factors that are not in the table",
    }
    assert {row.reason for row in unread} == {"the outputs do not depend on these tensors"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_tolerance_follows_the_dtype(dtype: torch.dtype) -> None:
    tensors, table = two_paths(dtype)
    seen: set[Any] = set()

    def run(t: Mapping[str, Tensor]) -> Tensor:
        seen.update(x.dtype for x in t.values())
        return run_both(t)

    report = check_symmetries(tensors, table, run)
    used = torch.float64 if dtype == torch.float64 else torch.float32
    assert report.ok
    assert seen == {used}
    assert report.unchanged == UNCHANGED[used]
    assert report.unchanged < CHANGED


def test_equal_values_hide_no_mistake() -> None:
    """With biases of 0, a table that forgets the biases would pass."""
    tensors, table = two_paths()
    tensors["first.bias"].zero_()
    forgotten = with_part(table, "first.bias", 0, free)
    moved = rewrite(tensors, random_transform(tensors, forgotten, seed=0))
    torch.testing.assert_close(run_both(moved), run_both(tensors), rtol=1e-12, atol=1e-12)
    report = check_symmetries(tensors, forgotten, run_both)
    assert {row.what for row in report.rows if not row.ok} == {"one order", "all at once"}


def test_the_model_is_not_touched_and_the_report_is_the_same_again() -> None:
    tensors, table = two_paths()
    before = {name: x.clone() for name, x in tensors.items()}
    done: list[tuple[int, int]] = []

    def report(seed: int) -> Report:
        return check_symmetries(tensors, table, run_both, seed=seed, progress=lambda *at: done.append(at))

    first = report(0)
    assert done == [(i + 1, len(first.rows)) for i in range(len(first.rows))]
    assert report(0) == first
    assert report(1) != first
    assert [row.what for row in report(1).rows] == [row.what for row in first.rows]
    assert all(torch.equal(tensors[name], x) for name, x in before.items())


def test_differences_are_relative_to_the_spread_of_the_outputs() -> None:
    tensors, table = two_paths()
    plain = check_symmetries(tensors, table, run_both)
    scaled = check_symmetries(tensors, table, lambda t: 1000 * run_both(t) + 1e4)
    for a, b in zip(plain.rows, scaled.rows, strict=True):
        assert b.difference == pytest.approx(a.difference, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("outputs", [torch.ones(4, 3), torch.full((4, 3), float("nan"))])
def test_outputs_that_say_nothing_are_refused(outputs: Tensor) -> None:
    tensors, table = two_paths()
    with pytest.raises(PlanError, match="outputs spread by"):
        check_symmetries(tensors, table, lambda _: outputs)


def test_a_table_that_does_not_fit_is_refused() -> None:
    tensors, table = two_paths()
    with pytest.raises(PlanError, match=r"aside.bias \[5\] float64: two has 6 units, the axis 5 entries"):
        check_symmetries({**tensors, "aside.bias": torch.zeros(5, dtype=torch.float64)}, table, run_both)


def test_outputs_that_are_not_finite_count_as_changed() -> None:
    tensors, table = two_paths()
    calls = iter(range(10**6))
    report = check_symmetries(tensors, table, lambda t: run_both(t) * (1 if next(calls) == 0 else float("nan")))
    assert not any(row.ok for row in report.rows if row.part == "kept")
    assert all(row.difference == float("inf") for row in report.rows)


# Random elements


@pytest.mark.parametrize("model", ["gpt2-untied", "bert-classifier", "llama", "qwen3", "resnet-bottleneck"])
@pytest.mark.parametrize("kinds", [("order",), ("scale",), ("rotation",), ("inside",), None])
def test_random_elements_are_such_elements(
    model: str, kinds: tuple[str, ...] | None, subjects: Subjects, tmp_path: Path
) -> None:
    subject, table = subjects(model)
    options: dict[str, Any] = {} if kinds is None else {"kinds": kinds}
    found = random_transform(subject.tensors, table, seed=3, **options)
    check_elements(found, model)
    found.save(tmp_path / "t.safetensors")
    again = open_transform(tmp_path / "t.safetensors")
    for name, element in found.elements.items():
        for part, value in vars(element).items():
            stored = None if name not in again.elements else getattr(again.elements[name], part)
            assert (value is None and stored is None) or torch.equal(value, cast(Tensor, stored))
    moved = rewrite(subject.tensors, found)
    torch.testing.assert_close(subject.run(moved), subject.run(subject.tensors), rtol=1e-4, atol=1e-6)
    if kinds == ("order",):
        for name, x in moved.items():
            assert torch.equal(x.flatten().sort()[0], subject.tensors[name].flatten().sort()[0])


def test_random_elements_differ_by_seed_and_by_nothing_else(subjects: Subjects) -> None:
    subject, table = subjects("llama")

    def drawn(seed: int) -> list[Tensor]:
        found = random_transform(subject.tensors, table, seed=seed)
        values = [value for element in found.elements.values() for value in vars(element).values()]
        return [value for value in values if value is not None] + [gain.new for gain in found.gains.values()]

    torch.manual_seed(1)
    first = drawn(0)
    torch.manual_seed(2)
    assert all(map(torch.equal, first, drawn(0)))
    assert not all(map(torch.equal, first, drawn(1)))


@pytest.mark.parametrize("keep_ones", [False, True])
def test_rotations_are_orthogonal(keep_ones: bool) -> None:
    q = random_rotation(17, torch.Generator().manual_seed(0), keep_ones=keep_ones)
    one = torch.ones(17, dtype=torch.float64)
    torch.testing.assert_close(q @ q.T, torch.eye(17, dtype=torch.float64), rtol=0, atol=1e-13)
    assert torch.allclose(q @ one, one, rtol=0, atol=1e-13) == keep_ones


def test_matrices_within_heads_are_of_their_family() -> None:
    """A phase commutes with the rotations of rotary positions, which turn entries i and i + head_dim / 2."""
    turn = torch.zeros(8, 8, dtype=torch.float64)
    angles = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    index = torch.arange(4)
    turn[index, index] = turn[index + 4, index + 4] = angles.cos()
    turn[index, index + 4], turn[index + 4, index] = -angles.sin(), angles.sin()
    names = ["q"]
    for family in ("phases", "signs", "linear"):
        table = read_table("q  heads:query", {"heads": Heads(2, 1, 8, family)}, names)
        element = random_transform({"q": torch.zeros(16)}, table, seed=0).elements["heads"]
        assert isinstance(element, HeadsElement)
        assert element.query_key is not None
        for matrix in element.query_key:
            assert torch.allclose(matrix @ turn, turn @ matrix, rtol=0, atol=1e-12) == (family != "linear")
            assert (matrix.abs().sum(0) == 1).all() == (family == "signs")


def test_the_old_gains_are_the_models_own(subjects: Subjects) -> None:
    subject, table = subjects("llama")
    gains = random_gains(subject.tensors, table, "residual", torch.Generator().manual_seed(0))
    assert set(gains) == {"attn.0", "attn.1", "mlp.0", "mlp.1", "final"}
    assert torch.equal(gains["final"].old, subject.tensors["model.norm.weight"])
    with pytest.raises(PlanError, match=r"model\.norm\.weight, the gain of final"):
        random_transform({n: x for n, x in subject.tensors.items() if n != "model.norm.weight"}, table, seed=0)


def test_an_order_is_never_the_identity() -> None:
    table = read_table("v  pair\nw  lone", {"pair": Units(2), "lone": Units(1)}, ["v", "w"])
    tensors = {"v": torch.zeros(2), "w": torch.zeros(1)}
    for seed in range(10):
        found: Transform = random_transform(tensors, table, seed=seed, kinds=["order"])
        pair, lone = found.elements["pair"], found.elements["lone"]
        assert isinstance(pair, UnitsElement) and pair.order is not None
        assert isinstance(lone, UnitsElement) and lone.order is not None
        assert pair.order.tolist() == [1, 0]
        assert lone.order.tolist() == [0]
