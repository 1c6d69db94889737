"""Blocks in parts where memory is short: many inputs, and many rows, have the bytes of a merge with ample memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_methods import CASES, DELTAS, ids, parameters_of, plan_of
from models import output_of
from safetensors.torch import save_file

from mergekit_lfm import merge_tensors
from mergekit_lfm.api.contract import least_memory, make_inputs
from mergekit_lfm.engine.blocks import Blocks
from mergekit_lfm.engine.execute import execute
from mergekit_lfm.errors import PlanError
from mergekit_lfm.kernels.derived import Derived
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.plan import budget
from mergekit_lfm.plan.budget import Budget
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.recipe.recipe import Recipe

Case = tuple[str, dict[str, Any]]
ELEMENTWISE = [case for case in CASES if METHODS[case[0]].whole is None]
MANY = [case for case in ELEMENTWISE if METHODS[case[0]].inputs[1] is None and not METHODS[case[0]].statistics]


def compare(plan: Plan, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Merge with ample and with the least memory; the number of blocks merged in parts with the latter."""
    parts = list[int]()
    pieces = Blocks.pieces

    def counted(self: Blocks, segment: int) -> list[tuple[int, int]]:
        if self.part is not None and self.part < self.block:
            parts.append(segment)
        return pieces(self, segment)

    monkeypatch.setattr(budget, "LEAST_PART", 32)
    execute(plan, folder / "ample", memory=1 << 30, threads=1)
    monkeypatch.setattr(Blocks, "pieces", counted)
    execute(plan, folder / "short", memory=least_memory(plan), threads=1)
    assert output_of(folder / "ample") == output_of(folder / "short")
    with pytest.raises(PlanError, match="raise --memory"):
        execute(plan, folder / "refused", memory=least_memory(plan) - 1, threads=1)
    return len(parts)


@pytest.mark.parametrize("case", ELEMENTWISE, ids=ids)
def test_blocks_in_parts_give_the_same_bytes(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(case, tmp_path, block=1 << 10)
    big = next(job for job in plan.tensors if job.name == "big")
    assert compare(plan, tmp_path, monkeypatch) or big.copied or big.needs_sums


@pytest.mark.parametrize("case", MANY, ids=ids)
def test_many_inputs_give_the_same_bytes_in_parts(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve inputs, which are more than are worked on at once; the memory is too short for a block of all."""
    name, extra = case
    draw = torch.Generator().manual_seed(3)
    base = torch.randn(60, 50, generator=draw)
    for i in range(13):
        (tmp_path / f"m{i}").mkdir()
        tuned = (base + 0.1 * torch.randn(60, 50, generator=draw)).bfloat16()
        save_file({"w": base.bfloat16() if i == 0 else tuned}, tmp_path / f"m{i}" / "model.safetensors")
    recipe: dict[str, Any] = {
        "merge_method": name,
        "models": [{"model": str(tmp_path / f"m{i}")} for i in range(1, 13)],
        "parameters": parameters_of(name, extra),
    }
    if name in DELTAS:
        recipe["base_model"] = str(tmp_path / "m0")
    plan = make_plan(Recipe.parse(recipe), block=1 << 10)
    (job,) = plan.tensors
    assert compare(plan, tmp_path, monkeypatch) or job.needs_sums
    assert Budget(plan).least(job) < Budget(plan).scratch(job) or METHODS[name].joint


@pytest.mark.parametrize("case", ELEMENTWISE, ids=ids)
def test_sums_of_all_inputs_together_are_declared(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    derived, block = list[str](), Derived.block

    def noted(self: Derived, given: Any) -> Any:
        derived.append(case[0])
        return block(self, given)

    monkeypatch.setattr(Derived, "block", noted)
    merge_tensors(case[0], **make_inputs(case[0]), **parameters_of(*case))
    assert METHODS[case[0]].joint or not derived


def test_rows_count_where_sums_of_each_are_kept(tmp_path: Path) -> None:
    """A long vector is one row; in the other shape every number is one, and `arcee_fusion` keeps a sum for each."""
    for i in range(2):
        tensors = {"vector": torch.zeros(100_000), "rows": torch.zeros(100_000, 1)}
        (tmp_path / f"m{i}").mkdir()
        save_file(tensors, tmp_path / f"m{i}" / "model.safetensors")
    models = {"models": [{"model": str(tmp_path / "m1")}], "base_model": str(tmp_path / "m0")}
    sums = {}
    for name in ("della", "arcee_fusion"):
        plan = make_plan(Recipe.parse(models | {"merge_method": name, "parameters": parameters_of(name, {})}))
        held = {job.name: Budget(plan).scratch(job) for job in plan.tensors}
        sums[name] = held["rows"] - 2 * 40 * 100_000, held["vector"] - 2 * 40 * 100_000
    assert sums == {"della": (0, 0), "arcee_fusion": (48 * 100_000, 48)}
