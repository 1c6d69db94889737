"""Methods that merge whole matrices without statistics: against the authors' formulas, and what only matrices show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from models import save_checkpoint
from oracles import doubles, to_bfloat16
from safetensors.torch import load_file

from mergekit_lfm import merge, merge_tensors
from mergekit_lfm.commands.show.plans import plan_data
from mergekit_lfm.errors import PlanError
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.recipe.recipe import Recipe

FORMULAS = {"tsv": oracles.tsv, "iso_c": oracles.iso_c}
METHODS = pytest.mark.parametrize("method", FORMULAS)
SHAPES = {"embed": (40, 12), "wide": (8, 24), "kernel": (6, 4, 3, 3), "square": (12, 12), "norm": (12,), "scalar": ()}


def models(count: int, shape: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    """A base, and `count` models near it, float64."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [base, *(base + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count))]


@METHODS
@pytest.mark.parametrize("shape", [(12, 20), (33, 7), (16, 16), (2, 9), (1, 5)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_agrees_with_the_formula_in_float64(method: str, shape: tuple[int, int], count: int) -> None:
    base, *tuned = models(count, shape)
    weights = [1.0, 0.5, -0.3, 1.2, 0.1][:count]
    merged = merge_tensors(method, tuned, base=base, weight=weights, lambda_=0.7)
    if method == "tsv" and min(shape) < count:
        assert int(torch.linalg.matrix_rank(merged - base, tol=1e-9)) <= min(shape)  # more triples than directions
        return
    deltas = [w * (doubles(x) - doubles(base)) for w, x in zip(weights, tuned, strict=True)]
    np.testing.assert_allclose(doubles(merged), doubles(base) + 0.7 * FORMULAS[method](deltas), rtol=0, atol=1e-13)


@METHODS
@pytest.mark.parametrize("shape", [(12,), (), (6, 4, 3, 3)], ids=str)
def test_other_tensors_get_the_mean_of_the_deltas(method: str, shape: tuple[int, ...]) -> None:
    base, *tuned = models(3, shape)
    merged = merge_tensors(method, tuned, base=base, weight=[1, 2, 0.5], lambda_=0.7)
    mean = sum(w * (x - base) for w, x in zip([1, 2, 0.5], tuned, strict=True)) / 3
    assert torch.allclose(merged, base + 0.7 * mean, rtol=0, atol=1e-14)


@METHODS
def test_kernels_are_flattened_if_asked(method: str) -> None:
    base, *tuned = models(2, (6, 4, 3, 3))
    merged = merge_tensors(method, tuned, base=base, decompose="kernels")
    flat = [x.reshape(6, 36) for x in (base, *tuned)]
    assert torch.equal(merged.reshape(6, 36), merge_tensors(method, flat[1:], base=flat[0]))


def test_iso_c_has_one_singular_value_and_the_direction_of_the_sum() -> None:
    base, *tuned = models(3, (20, 9))
    delta, total = merge_tensors("iso_c", tuned, base=base) - base, sum(x - base for x in tuned)
    assert isinstance(total, torch.Tensor)
    values = torch.linalg.svdvals(total)
    assert torch.allclose(torch.linalg.svdvals(delta), values.mean().expand(9), atol=1e-13)
    assert float((delta * total).sum()) == pytest.approx(float(values.sum() * values.mean()))


def test_tsv_of_one_model_is_that_model_and_of_orthogonal_deltas_their_sum() -> None:
    base, tuned = models(1, (20, 9))
    assert torch.allclose(merge_tensors("tsv", [tuned], base=base), tuned, atol=1e-13)
    u, v = (torch.linalg.qr(torch.randn(n, 8, dtype=torch.float64)).Q for n in (20, 9))
    deltas = [(u[:, part] * torch.tensor([3.0, 2, 1, 0.5], dtype=torch.float64)) @ v[:, part].T for part in HALVES]
    merged = merge_tensors("tsv", [base + delta for delta in deltas], base=base)
    assert torch.allclose(merged, base + deltas[0] + deltas[1], atol=1e-13)


HALVES = (slice(0, 4), slice(4, 8))


@METHODS
def test_directions_that_no_model_changed_stay_as_they_are(method: str) -> None:
    """LAPACK completes singular vectors arbitrarily; the result must not see these."""
    base = torch.randn(12, 10, dtype=torch.float64)
    unchanged = merge_tensors(method, [base.clone(), base.clone()], base=base)
    assert torch.equal(unchanged, base)
    low = torch.randn(12, 2, dtype=torch.float64) @ torch.randn(2, 10, dtype=torch.float64)
    delta = merge_tensors(method, [base + low, base + low, base], base=base) - base
    away = torch.linalg.qr(low, mode="complete").Q[:, 2:]
    assert float((away.T @ delta).abs().max()) < 1e-12
    assert float(delta.norm()) > 0.1


def test_tsv_counts_the_deltas_of_equal_models_once() -> None:
    base, tuned = models(1, (12, 10))
    merged = merge_tensors("tsv", [tuned, tuned], base=base)
    u, s, vh = torch.linalg.svd(tuned - base, full_matrices=False)
    assert torch.allclose(merged - base, (u[:, :5] * s[:5]) @ vh[:5], atol=1e-13)


# Whole checkpoints


def save(folder: Path, count: int = 2, dtype: torch.dtype = torch.bfloat16) -> list[dict[str, torch.Tensor]]:
    """A base and models, saved as `m0`, `m1`, ..."""
    tensors: list[dict[str, torch.Tensor]] = [{} for _ in range(count + 1)]
    for seed, (name, shape) in enumerate(SHAPES.items()):
        for own, x in zip(tensors, models(count, shape, seed), strict=True):
            own[name] = x.to(dtype)
    for i, own in enumerate(tensors):
        save_checkpoint(folder / f"m{i}", own, {"model_type": "none"})
    return tensors


def plan(folder: Path, method: str, **parameters: Any) -> Plan:
    names = [{"model": str(folder / name)} for name in ("m1", "m2")]
    recipe = {"merge_method": method, "base_model": str(folder / "m0"), "models": names, "parameters": parameters}
    return make_plan(Recipe.parse(recipe))


@METHODS
def test_a_recipe_decomposes_every_matrix_of_a_checkpoint(method: str, tmp_path: Path) -> None:
    """Planned as weighted averages, these merges would end well, and be wrong."""
    base, *tuned = save(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
merge_method: {method}
base_model: m0
models: [{{model: m1, parameters: {{weight: 0.5}}}}, {{model: m2}}]
parameters:
  decompose: [{{filter: square, value: none}}, {{value: kernels}}]
"""
    )
    got = load_file(Path(merge(recipe, tmp_path / "out")) / "model.safetensors")
    for name, shape in SHAPES.items():
        start = doubles(base[name])
        deltas = [w * (doubles(own[name]) - start) for w, own in zip((0.5, 1.0), tuned, strict=True)]
        if name in ("embed", "wide", "kernel"):
            change = FORMULAS[method]([delta.reshape(shape[0], -1) for delta in deltas]).reshape(shape)
        else:
            change = np.mean(deltas, axis=0)
        expected = to_bfloat16(start + change)
        apart = np.abs(doubles(got[name]) - expected) / np.maximum(np.abs(expected), 1e-3)
        assert apart.max() < 2**-7 and (apart > 0).mean() < 0.05, name  # another rounding where float32 sums meet a tie


@METHODS
def test_matrices_are_merged_whole_and_their_memory_is_planned(method: str, tmp_path: Path) -> None:
    save(tmp_path)
    made = plan(tmp_path, method)
    assert [made.tensors[i].name for group in made.matrices for i in group.jobs] == ["embed", "square", "wide"]
    assert all(group.nbytes > 8 * 4 * made.tensors[group.jobs[0]].spec.numel for group in made.matrices)
    assert {job.method for job in made.tensors} == {method}
    assert plan_data(made)["matrices"] == {"tensors": 3, "numbers": 40 * 12 + 12 * 12 + 8 * 24}


@METHODS
def test_a_plan_without_a_matrix_is_refused(method: str, tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(PlanError, match=f"{method} merges matrices, and the parameters leave it none of the 6 tensors"):
        plan(tmp_path, method, decompose="none")
