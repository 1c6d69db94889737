"""The contract of every merge method in the registry, whatever its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_methods import (
    CASES,
    DELTAS,
    ids,
    least_memory,
    parameters_of,
    plan_of,
    scaled_parameters,
    tensors_of,
)
from models import files_of

from mergekit_lfm import merge_tensors
from mergekit_lfm.engine.execute import execute
from mergekit_lfm.errors import PlanError
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.plan.budget import Budget

HOMOGENEOUS = [case for case in CASES if METHODS[case[0]].homogeneous]
SYMMETRIC = [name for name, m in METHODS.items() if m.inputs != (1, 1) and m.base != "first" and not m.random]


def all_of(given: dict[str, Any]) -> list[torch.Tensor]:
    """Every tensor of the arguments."""
    return [x for x in [*given["tensors"], given["base"], *given.get("statistics", [])] if x is not None]


@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        *((dtype, (12, 20)) for dtype in (torch.float32, torch.bfloat16, torch.float64)),
        *((torch.bfloat16, shape) for shape in [(7,), (1,), (3, 1), (), (0, 5), (2, 3, 5)]),
    ],
)
def test_shape_dtype_and_inputs(case: tuple[str, dict[str, Any]], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    name, extra = case
    if METHODS[name].statistics == "gram" and len(shape) != 2:
        with pytest.raises(PlanError, match="merges matrices"):
            merge_tensors(name, [torch.ones(shape)], statistics=[torch.ones(1, 1)], **parameters_of(name, extra))
        return
    given = tensors_of(name, shape, dtype)
    before = [tensor.clone() for tensor in all_of(given)]
    result = merge_tensors(name, **given, **parameters_of(name, extra))
    assert result.shape == shape and result.dtype == dtype and bool(result.isfinite().all())
    assert all(torch.equal(a, b) for a, b in zip(all_of(given), before, strict=True))


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_no_change_in_no_change_out(case: tuple[str, dict[str, Any]]) -> None:
    """Equal inputs give themselves; all-zero deltas give the base."""
    name, extra = case
    if "scale" in extra:
        return
    given = tensors_of(name)
    same = given["tensors"][0]
    given["tensors"] = [same.clone() for _ in given["tensors"]]
    given["base"] = None if given["base"] is None else same.clone()
    result = merge_tensors(name, **given, **parameters_of(name, extra))
    if name in DELTAS and given["base"] is not None:
        assert torch.equal(result, same)
    assert torch.allclose(result, same, rtol=1e-6)


def scaled(given: dict[str, Any], factor: float) -> dict[str, Any]:
    """The arguments with the inputs and the base times a factor; statistics stay."""
    base = None if given["base"] is None else given["base"] * factor
    return given | {"tensors": [x * factor for x in given["tensors"]], "base": base}


@pytest.mark.parametrize("case", HOMOGENEOUS, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_power_of_two_goes_through_bit_for_bit(case: tuple[str, dict[str, Any]], dtype: torch.dtype) -> None:
    """A size that the method compares with a constant would show."""
    given = tensors_of(case[0], dtype=dtype)
    plain = merge_tensors(case[0], **given, **parameters_of(*case))
    for power in (-40, -20, 20, 40):
        found = merge_tensors(case[0], **scaled(given, 2.0**power), **scaled_parameters(*case, 2.0**power))
        assert torch.equal(found, plain * 2.0**power), power


@pytest.mark.parametrize("case", HOMOGENEOUS, ids=ids)
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_a_factor_goes_through_within_rounding(case: tuple[str, dict[str, Any]], factor: float) -> None:
    given = tensors_of(case[0], dtype=torch.float64)
    plain = merge_tensors(case[0], **given, **parameters_of(*case))
    found = merge_tensors(case[0], **scaled(given, factor), **scaled_parameters(*case, factor))
    assert torch.allclose(found / factor, plain, rtol=0, atol=1e-12 * float(plain.abs().max()))


@pytest.mark.parametrize("case", [case for case in CASES if METHODS[case[0]].statistics], ids=ids)
def test_the_size_of_the_statistics_does_not_matter(case: tuple[str, dict[str, Any]]) -> None:
    if case[1].get("epsilon"):
        return  # an absolute number that the user asks for
    given, parameters = tensors_of(case[0]), parameters_of(*case)
    plain = merge_tensors(case[0], **given, **parameters)
    for factor in (1e-12, 1e-6, 1e6):
        statistics = [x.double() * factor for x in given["statistics"]]
        found = merge_tensors(case[0], **given | {"statistics": statistics}, **parameters)
        assert torch.allclose(found, plain, rtol=1e-6, atol=1e-6), factor


@pytest.mark.parametrize("name", SYMMETRIC)
def test_the_order_of_the_inputs_does_not_matter(name: str) -> None:
    given = tensors_of(name)
    parameters = parameters_of(name, {})
    one = merge_tensors(name, **given, **parameters)
    given = {key: value[::-1] if isinstance(value, list) else value for key, value in given.items()}
    assert torch.allclose(merge_tensors(name, **given, **parameters), one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.random])
def test_random_methods_follow_the_seed_and_the_name(name: str) -> None:
    given = tensors_of(name)
    parameters = parameters_of(name, {"density": 0.5})
    one = merge_tensors(name, **given, **parameters, seed=1)
    assert torch.equal(merge_tensors(name, **given, **parameters, seed=1), one)
    assert not torch.equal(merge_tensors(name, **given, **parameters, seed=2), one)
    assert not torch.equal(merge_tensors(name, **given, **parameters, seed=1, name="other"), one)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_in_passes_or_at_once_gives_the_same_bytes(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """With blocks of 256 elements the largest tensor has three segments and does not fit a worker's share."""
    plan = plan_of(case, tmp_path)
    big = next(job for job in plan.tensors if job.name == "big")
    small = 3 * least_memory(plan)
    assert Budget(plan).resident([plan.tensors.index(big)]) > small // 3 or not big.needs_sums
    execute(plan, tmp_path / "at-once", memory=1 << 30, threads=1)
    execute(plan, tmp_path / "in-passes", memory=small, threads=3)
    assert files_of(tmp_path / "at-once") == files_of(tmp_path / "in-passes")
