"""Tensors that are copied: their bytes over several segments, and the comparison of all their sources."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import save_checkpoint
from safetensors.torch import load_file

from mergekit_lfm.engine.execute import check_copies, execute
from mergekit_lfm.errors import PlanError
from mergekit_lfm.kernels.block import SEGMENT
from mergekit_lfm.output.shards import ShardFiles
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe

BLOCK = 16


@pytest.mark.parametrize("in_the_kernel", [True, False])
def test_a_copy_of_several_segments_has_the_bytes_of_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_the_kernel: bool
) -> None:
    if not in_the_kernel:
        monkeypatch.setattr(ShardFiles, "copy", lambda *_: False)
    x = torch.arange(2.0 * BLOCK * SEGMENT + 7)
    model = save_checkpoint(tmp_path / "model", {"before": torch.ones(3), "x": x}, {})
    recipe = Recipe.parse({"merge_method": "passthrough", "models": [{"model": str(model)}]})
    plan = make_plan(recipe, block=BLOCK)
    assert [job.segments for job in plan.tensors] == [1, 3]
    execute(plan, tmp_path / "out", threads=1)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["x"], x)


def test_integers_that_differ_in_their_last_byte_are_not_copied(tmp_path: Path) -> None:
    """Sources are compared some megabytes at a time."""
    x = torch.zeros((1 << 22) + 1, dtype=torch.uint8)
    for last, name in enumerate("ab"):
        x[-1] = last
        save_checkpoint(tmp_path / name, {"x": x}, {})
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 1}} for name in "ab"]
    with pytest.raises(PlanError, match=r"x .* differs between"):
        check_copies(make_plan(Recipe.parse({"merge_method": "linear", "models": models})))
