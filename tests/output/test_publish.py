"""The checks before an output is published: its inputs are as they were, and OUT.partial holds what was planned."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_stats import write_fisher
from helpers_views import make_patch
from models import files_of, save_checkpoint

from mergekit_lfm.align.elements import random_transform
from mergekit_lfm.arch import find_symmetries
from mergekit_lfm.engine.execute import execute
from mergekit_lfm.errors import FormatError
from mergekit_lfm.plan.plan import Plan, make_plan
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.checkpoint import open_checkpoint

SHAPES = {"0.weight": (6, 4), "0.bias": (6,), "2.weight": (3, 6), "2.bias": (3,)}
LINEAR: dict[str, Any] = {"merge_method": "linear", "parameters": {"weight": 1}}


def save_models(folder: Path) -> None:
    """Two chains of linear layers, with Fisher information of each, a transform of b and a patch of a."""
    draw = torch.Generator().manual_seed(0)
    for name in "ab":
        tensors = {key: torch.randn(shape, generator=draw) for key, shape in SHAPES.items()}
        save_checkpoint(folder / name, tensors, {}, shards=2)
        write_fisher(folder / f"{name}.fisher", folder / name, {key: x.abs() for key, x in tensors.items()})
    transform = random_transform({}, find_symmetries(open_checkpoint(folder / "b")), seed=1, kinds=["order"])
    transform.save(folder / "b.transform")
    make_patch(open_checkpoint(folder / "a"), ["0.weight"], rank=1).save(folder / "a.patch")


def plan_with(folder: Path, kind: str = "") -> Plan:
    """The plan of a merge that also reads a file of this kind."""
    models: dict[str, dict[str, Any]] = {name: {"model": name} for name in "ab"}
    recipe = dict(LINEAR)
    if kind == "fisher":
        recipe = {"merge_method": "fisher"}
        models = {name: {"model": name, "stats": f"{name}.fisher"} for name in "ab"}
    if kind == "transform":
        models["b"]["align"] = "b.transform"
    if kind == "patch":
        models["a"]["edits"] = ["a.patch"]
    if kind == "result":
        recipe["edits"] = ["a.patch"]
    return make_plan(Recipe.parse({**recipe, "models": [*models.values()]}, where=folder))


def rewrite(path: Path) -> None:
    """Write other bytes of the same number into the file, and set its time back."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path: Path) -> None:
    """Put another file, with the same bytes and times, in the place of this one."""
    status, data = path.stat(), path.read_bytes()
    other = path.with_name("other")
    other.write_bytes(data)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)


WEIGHTS = "a/model-00002-of-00002.safetensors"
CHANGES: list[tuple[Callable[[Path], object], str, str]] = [
    (rewrite, WEIGHTS, ""),
    (replace, WEIGHTS, ""),
    (Path.unlink, "a/model-00001-of-00002.safetensors", ""),
    (rewrite, "b/model-00001-of-00002.safetensors", "transform"),
    (rewrite, "b.fisher", "fisher"),
    (rewrite, "b.transform", "transform"),
    (rewrite, "a.patch", "patch"),
    (rewrite, "a.patch", "result"),
]


@pytest.mark.parametrize(("change", "name", "kind"), CHANGES)
def test_an_input_that_changes_during_the_merge_is_no_output(
    tmp_path: Path, change: Callable[[Path], object], name: str, kind: str
) -> None:
    save_models(tmp_path)
    plan = plan_with(tmp_path, kind)
    done: list[int] = []

    def progress(nbytes: int) -> None:
        if nbytes and not done:
            change(tmp_path / name)
            done.append(nbytes)

    with pytest.raises(FormatError, match=f"{Path(name).name} was changed"):
        execute(plan, tmp_path / "out", threads=1, progress=progress)
    assert not (tmp_path / "out").exists()


class Interrupted(Exception):
    """Stands for the end of the process."""


def interrupt(plan: Plan, out: Path) -> None:
    """Merge, but for the last part."""
    left = plan.bytes_written

    def progress(nbytes: int) -> None:
        nonlocal left
        left -= nbytes
        if nbytes and left < plan.bytes_written // 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        execute(plan, out, threads=1, progress=progress)


def test_an_input_that_changed_since_an_interrupted_run_is_no_output(tmp_path: Path) -> None:
    """With its time set back the plan is the same, but the finished part was made from the old bytes."""
    save_models(tmp_path)
    interrupt(plan_with(tmp_path), tmp_path / "out")
    rewrite(tmp_path / "a" / "model-00001-of-00002.safetensors")
    before = files_of(tmp_path)
    with pytest.raises(FormatError, match=r"model-00001-of-00002.safetensors was changed .* --no-resume"):
        execute(plan_with(tmp_path), tmp_path / "out")
    assert files_of(tmp_path) == before
    execute(plan_with(tmp_path), tmp_path / "out", resume=False)
    execute(plan_with(tmp_path), tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_unchanged_inputs_are_resumed(tmp_path: Path) -> None:
    save_models(tmp_path)
    interrupt(plan_with(tmp_path), tmp_path / "out")
    assert execute(plan_with(tmp_path), tmp_path / "out").resumed_bytes > 0
