"""Cases of mergekit's language, from recipe to checkpoint, each against a formula of its own.

The numbers in the tests' names are the cases' in our list. Others of the list are tested where their subject is:
resuming (D15) in tests/output/test_kill_resume.py, outputs that are inputs (D17) in test_accept_destination.py, ten
thousand tensors (D21) in test_outputs.py, full disks (D23) in tests/output/test_faults.py; those about tokenizers with
tokenizers; the others in test_mergekit_forms.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import oracles_deltas
import pytest
import torch
from fixtures_llama import Tensors, load
from helpers_mergekit import World
from models import save_checkpoint
from oracles import Expected, assert_close, doubles

from mergekit_lfm import merge

Run = Callable[..., Tensors]
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("cases"))


@pytest.fixture
def run(world: World, tmp_path: Path) -> Run:
    """Merges a recipe and loads the result."""
    return world.runner(tmp_path)


# ------------------------------------------------------------------ methods

Formula = Callable[..., Expected]  # of a tensor in each of the models named beside it
LAMBDA: dict[str, Any] = {"lambda": 0.8}
AB = "models: [{model: A}, {model: B}]"
METHODS: dict[str, tuple[str, str, Formula]] = {
    "A01 linear": (
        "{merge_method: linear, models: [{model: A, parameters: {weight: 1}}, {model: B, parameters: {weight: 3}}], "
        "dtype: float32}",
        "A B",
        lambda a, b: oracles.linear([a, b], [1, 3]),
    ),
    "A07 slerp of near models": (
        "{merge_method: slerp, base_model: A, models: [{model: A}, {model: NEAR}], parameters: {t: 0.5}}",
        "A NEAR",
        lambda a, b: oracles.linear([a, b], [1, 1]),
    ),
    "A09 nuslerp without a base": (
        "{merge_method: nuslerp, models: [{model: A, parameters: {weight: 0.7}}, "
        "{model: OPPOSITE, parameters: {weight: 0.3}}]}",
        "A OPPOSITE",
        lambda a, b: oracles.nuslerp([a, b], [0.7, 0.3]),
    ),
    "A11 nuslerp of opposite weights": (
        "{merge_method: nuslerp, models: [{model: A, parameters: {weight: 0.5}}, "
        "{model: B, parameters: {weight: -0.5}}]}",
        "A B",
        lambda a, b: oracles.nuslerp([a, b], [1, 1]),
    ),
    "A21 nearswap": (
        "{merge_method: nearswap, base_model: A, models: [{model: B}], parameters: {t: 0.01}}",
        "A B",
        lambda a, b: oracles.nearswap([a, b], 0.01),
    ),
    "A25 ram of deltas that meet": (
        f"{{merge_method: ram, base_model: BASE, {AB}, parameters: {{epsilon: 0}}}}",
        "BASE A B",
        lambda base, a, b: oracles_deltas.ram([a, b], base, epsilon=0.0),
    ),
    "A27 task arithmetic": (
        "{merge_method: task_arithmetic, base_model: BASE, models: [{model: A, parameters: {weight: 0.3}}, "
        "{model: B, parameters: {weight: -0.5}}]}",
        "BASE A B",
        lambda base, a, b: oracles.task_arithmetic([a, b], [0.3, -0.5], base),
    ),
    "A29 ties": (
        "{merge_method: ties, base_model: BASE, parameters: {lambda: 0.8}, models: ["
        + ", ".join(
            f"{{model: {n}, parameters: {{weight: {w}, density: 0.4}}}}"
            for n, w in {"A": 1, "B": 0.5, "C": 0.7}.items()
        )
        + "]}",
        "BASE A B C",
        lambda base, *xs: oracles.ties(xs, [1, 0.5, 0.7], base, [0.4] * 3, **LAMBDA),
    ),
}


@pytest.mark.parametrize("case", METHODS)
def test_methods(case: str, run: Run, world: World) -> None:
    text, names, formula = METHODS[case]
    merged, models = run(text), [world[name] for name in names.split()]
    assert merged.keys() == models[0].keys() and len(merged) == 21
    for name, x in merged.items():
        assert_close(x, formula(*(doubles(model[name]) for model in models)))


SAME: dict[str, tuple[str, str]] = {
    "A03 a mean of copies": (
        "{merge_method: linear, parameters: {weight: 0.1}, models: ["
        + ", ".join(f"{{model: COPY{i}}}" for i in range(10))
        + "]}",
        "A16",
    ),
    "A05 slerp at 0": (f"{{merge_method: slerp, base_model: A, {AB}, parameters: {{t: 0}}}}", "A"),
    "A05 slerp at 1": (f"{{merge_method: slerp, base_model: A, {AB}, parameters: {{t: 1}}}}", "B"),
    "A13 multislerp of one": (
        "{merge_method: multislerp, base_model: BASE, models: [{model: A, parameters: {weight: 0.1}}]}",
        "A",
    ),
    "A15 passthrough": ("{merge_method: passthrough, models: [{model: A}]}", "A"),
    "A15 passthrough in bfloat16": ("{merge_method: passthrough, models: [{model: A16}]}", "A16"),
    "A19 model_stock of opposite deltas": (
        "{merge_method: model_stock, base_model: BASE, models: [{model: A}, {model: OPPOSITE}]}",
        "BASE",
    ),
    "A21 nearswap at 0": (
        "{merge_method: nearswap, base_model: A, models: [{model: B}], parameters: {t: 0}}",
        "A",
    ),
    "A21 nearswap beyond all": (
        "{merge_method: nearswap, base_model: A, models: [{model: B}], parameters: {t: 1e9}}",
        "B",
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_one_of_the_inputs(case: str, run: Run, world: World) -> None:
    text, name = SAME[case]
    merged, expected = run(text), world[name]
    assert merged.keys() == expected.keys()
    assert [n for n, x in expected.items() if not torch.equal(merged[n], x)] == []


def test_a17_scale_as_a_mapping(run: Run, world: World) -> None:
    merged = run(
        "{merge_method: passthrough, models: [{model: A, parameters: {scale: {filter: down_proj, value: 0}}}]}"
    )
    for name, x in world["A"].items():
        assert torch.equal(merged[name], torch.zeros_like(x) if "down_proj" in name else x)


def test_a23_arcee_fusion_of_many_elements_has_no_chance(tmp_path: Path) -> None:
    """Another seed, the same bytes; and the exact quartiles of all elements."""
    draw, tensors = torch.Generator().manual_seed(0), {}
    for name in "ab":
        tensors[name] = torch.randn(1009, 1000, generator=draw)
        save_checkpoint(tmp_path / name, {"w": tensors[name]}, {})
    recipe = {"merge_method": "arcee_fusion", "base_model": str(tmp_path / "a")}
    recipe["models"] = [{"model": str(tmp_path / "b")}]  # type: ignore[assignment]
    one, other = (load(Path(merge(recipe, tmp_path / f"out{seed}", seed=seed)))["w"] for seed in (1, 2))
    assert torch.equal(one, other)
    assert_close(one, oracles.arcee_fusion([doubles(tensors[name]) for name in "ab"]))


def test_a25_ram_of_deltas_that_do_not_meet(run: Run, world: World) -> None:
    merged = run("{merge_method: ram, base_model: BASE, models: [{model: EVEN}, {model: ODD}]}")
    assert all(torch.equal(merged[name], x + 0.25) for name, x in world["BASE"].items())


def test_a31_ties_keeps_one_entry_at_least(run: Run, world: World) -> None:
    merged = run(
        "{merge_method: ties, base_model: BASE, models: [{model: A, parameters: {weight: 1, density: 0.001}}]}"
    )
    for name, base in world["BASE"].items():
        (changed,) = [(merged[name] != base).sum().item()]
        assert changed == max(1, int(0.001 * base.numel()))


def test_a33_dare_linear_without_rescaling(run: Run, world: World) -> None:
    line = "{model: A, parameters: {weight: 1, density: 0.5}}"
    merged = run(
        f"{{merge_method: dare_linear, base_model: BASE, models: [{line}], parameters: {{rescale: false}}}}", seed=3
    )
    base, a = world["BASE"], world["A"]
    for name, x in merged.items():
        kept = x != base[name]
        assert torch.equal(x[kept], a[name][kept]) and 0.2 < kept.float().mean() < 0.8


def test_a35_masks_of_one_seed(run: Run) -> None:
    text = (
        "{merge_method: dare_ties, base_model: BASE, seed: 11, models: "
        "[{model: A, parameters: {weight: 0.5, density: 0.3}}, {model: B, parameters: {weight: 0.5, density: 0.6}}]}"
    )
    one, many, other = run(text, threads=1), run(text, threads=8, memory="60MB"), run(text, seed=12)
    assert all(torch.equal(x, many[name]) for name, x in one.items())
    assert any(not torch.equal(x, other[name]) for name, x in one.items())


def test_a37_breadcrumbs_keeps_the_middle(run: Run, world: World) -> None:
    parameters = "{weight: 1, density: 0.5, gamma: 0.1}"
    merged = run(f"{{merge_method: breadcrumbs, base_model: BASE, models: [{{model: A, parameters: {parameters}}}]}}")
    base, a = world["BASE"][NORM], world["A"][NORM]
    sizes = (a - base).abs().double().numpy() - 1e-9 * np.arange(64)  # among equals the lower index is the larger
    ranks = np.argsort(np.argsort(sizes))
    kept = (merged[NORM] != base).numpy() | ((a == base).numpy() & (ranks >= 26) & (ranks <= 57))
    assert sorted(ranks[kept]) == list(range(26, 58))


def test_a39_probabilities_of_della(world: World, tmp_path: Path) -> None:
    line = "{model: A, parameters: {weight: 1, density: 0.1, epsilon: 0.2}}"
    message = world.refuse(f"{{merge_method: della, base_model: BASE, models: [{line}]}}", tmp_path / "out")
    assert "density 0.1 and epsilon 0.2 give probabilities from -0.1" in message


@pytest.mark.parametrize(
    ("method", "scale"),
    [
        *[("ties", 1.0), ("della", 1.0), ("dare_ties", 0.5), ("breadcrumbs_ties", 0.5), ("della_linear", 0.5)],
        *[("task_arithmetic", 0.5), ("dare_linear", 0.5), ("breadcrumbs", 0.5)],
    ],
)
def test_a41_weights_are_normalised_by_some(method: str, scale: float, run: Run, world: World) -> None:
    lines = "[{model: EVEN}, {model: EVEN}]"
    for weights in (0.25, 0.5):
        merged = run(
            f"{{merge_method: {method}, base_model: BASE, models: {lines}, parameters: {{weight: {weights}}}}}"
        )
        factor = scale if weights == 0.25 or scale == 1.0 else 2 * scale
        for name, base in world["BASE"].items():
            torch.testing.assert_close(merged[name], base + factor * (world["EVEN"][name] - base))
