"""Stacks keep the promises of every merge: the same bytes for any threads, memory, processes and interruptions."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_faults import Forks, llama_tensors, near, save_model, snapshot
from helpers_merges import load_all
from helpers_processes import Processes, on
from helpers_stacks import place, source, stack
from models import output_of

from mergekit_lfm.api.contract import least_memory
from mergekit_lfm.engine.execute import execute
from mergekit_lfm.errors import PlanError
from mergekit_lfm.kernels.random import key
from mergekit_lfm.plan import budget
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.recipe.recipe import Recipe

LAYERS = 4
ZERO = {"scale": [{"filter": "o_proj", "value": 0}, {"filter": "down_proj", "value": 0}, {"value": 1}]}
RECIPES = {
    "passthrough": stack([source("a", 0, 3)], [source("b", 1, 4, **ZERO)], [source("a", 3, 4)]),
    "ties": stack(
        [source("o", 0, 2), source("a", 0, 2), source("b", 0, 2)],
        [source("o", 2, 3)],
        [source("o", 1, 4), source("b", 0, 3)],
        merge_method="ties",
        base_model="o",
        parameters={"weight": [0.3, 0.9], "density": 0.4},
    ),
    "dare": stack(
        [source("o", 0, 3), source("a", 0, 3)],
        [source("o", 0, 3), source("a", 0, 3)],
        merge_method="dare_linear",
        base_model="o",
        parameters={"weight": 1.0, "density": 0.5},
    ),
    "slerp": stack(
        [source("a", 0, 2), source("b", 1, 3)],
        [source("a", 3, 4)],
        merge_method="slerp",
        base_model="a",
        parameters={"t": [0.2, 0.7]},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of four layers in two shards."""
    folder = tmp_path_factory.mktemp("stacks")
    base = {name: x.bfloat16() for name, x in llama_tensors(0, layers=LAYERS).items()}
    for name, tensors in {"o": base, "a": near(base, 1), "b": near(base, 2)}.items():
        save_model(folder / name, tensors, shards=2)
    return folder


def plan_of(name: str, folder: Path) -> Plan:
    return make_plan(Recipe.parse(place(RECIPES[name], folder)), block=1 << 10)


@pytest.mark.parametrize("name", RECIPES)
def test_memory_and_threads_change_nothing(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "LEAST_PART", 32)
    plan = plan_of(name, folder)
    execute(plan, tmp_path / "one", memory=1 << 30, threads=1)
    execute(plan, tmp_path / "two", threads=2)
    execute(plan, tmp_path / "short", memory=least_memory(plan), threads=1)
    assert output_of(tmp_path / "one") == output_of(tmp_path / "two") == output_of(tmp_path / "short")
    with pytest.raises(PlanError, match="raise --memory"):
        execute(plan, tmp_path / "refused", memory=least_memory(plan) - 1, threads=1)


def test_processes_that_are_lost_change_nothing(folder: Path, tmp_path: Path) -> None:
    plan = plan_of("ties", folder)
    execute(plan, tmp_path / "one", threads=1)
    pool = Processes(kill=lambda number: number == 2)
    execute(pickle.loads(pickle.dumps(plan)), tmp_path / "lost", threads=2, engine=on(pool))
    assert pool.lost == 1 and output_of(tmp_path / "lost") == output_of(tmp_path / "one")


@pytest.mark.parametrize("name", RECIPES)
def test_layers_that_come_again_take_no_more_memory(name: str, folder: Path) -> None:
    recipes = [{**RECIPES[name], "slices": RECIPES[name]["slices"][:1] * count} for count in (1, 20)]
    one, many = (make_plan(Recipe.parse(place(recipe, folder))) for recipe in recipes)
    assert len(many.tensors) > 15 * len(one.tensors) and least_memory(one) == least_memory(many)


def test_masks_are_those_of_the_output_s_names(folder: Path, tmp_path: Path) -> None:
    """A layer that comes twice is sparse in other places the second time."""
    plan = plan_of("dare", folder)
    execute(plan, tmp_path / "out")
    merged = load_all(tmp_path / "out")
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (1, 4)]
    assert not torch.equal(*(merged[name] for name in names)) and key(0, names[0], 0) != key(0, names[1], 0)
    base, a = (load_all(folder / name)[names[0]] for name in "oa")
    changed = [merged[name] != base for name in names]
    assert all(0.3 < each.float().mean() < 0.7 for each in changed)
    assert (changed[0] & changed[1] & (a != base)).any() and (changed[0] & ~changed[1]).any()


@pytest.mark.parametrize("moments", [3, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["passthrough", "ties"])
def test_killed_at_any_moment_it_goes_on(name: str, moments: int, folder: Path, cli: Forks, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(place(RECIPES[name], folder)))

    def run(**fault: Any) -> Any:
        ran = cli.run("recipe.yaml", "out", "--threads", "1", cwd=tmp_path, sync_bytes=20_000, **fault)
        assert ran.code in ((-9, 0) if fault else (0,)), ran.err
        return ran

    calls = len(run().calls)
    expected = snapshot(tmp_path / "out")
    for moment in range(moments):
        (tmp_path / "out").rename(tmp_path / f"done{moment}")
        run(kill_at=1 + moment * calls // moments, torn=moment % 2 == 1)
        run()
        assert snapshot(tmp_path / "out") == expected and not (tmp_path / "out.partial").exists()
