"""Recipes of several stages: planned together, carried out in order, resumed, and not made again if nothing changed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_faults import Forks, llama_tensors, near, output_snapshot, save_model, snapshot
from helpers_merges import Tensors, load_all

from mergekit_lfm import merge
from mergekit_lfm.api.merge_plans import plan_merge
from mergekit_lfm.api.planned import PlannedMerge
from mergekit_lfm.errors import PlanError
from mergekit_lfm.output.lock import lock_of, verify

FIRST = "name: first\nmerge_method: linear\nparameters: {weight: 1}\nmodels: [{model: models/a}, {model: models/b}]\n"
SECOND = (
    "name: second\nmerge_method: passthrough\nslices:\n"
    "  - sources: [{model: first, layer_range: [0, 2]}]\n"
    "  - sources: [{model: models/b, layer_range: [1, 2]}]\n"
)
THIRD = "merge_method: passthrough\nmodels: [{model: second}]\n"
TWO = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: first}, {model: models/a}]\n"
RECIPE = f"{FIRST}---\n{TWO}"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensors]:
    """Two models in a folder with the recipe, which is the working directory."""
    base = llama_tensors(0)
    tensors = {"a": base, "b": near(base, 1)}
    for name, each in tensors.items():
        save_model(tmp_path / "models" / name, each)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tensors


def times(folder: Path) -> dict[str, int]:
    """When each file of an output was made."""
    return {path.name: path.stat().st_ctime_ns for path in folder.iterdir()}


def test_stages_are_made_from_one_another(models: dict[str, Tensors]) -> None:
    outcome = merge("recipe.yaml", "out")
    out = Path(outcome)
    (first,) = outcome.result.stages
    assert first.path == Path("out.stages/first") and verify(out) == verify(Path(first)) == []
    for name, x in load_all(out).items():
        a, b = models["a"][name], models["b"][name]
        assert torch.equal(x, (((a.double() + b.double()) / 2).float().double().add(a.double()) / 2).float())


def test_the_order_of_the_documents_does_not_matter(models: dict[str, Tensors], tmp_path: Path) -> None:
    merge("recipe.yaml", "out")
    (tmp_path / "recipe.yaml").write_text(f"---\n{TWO}---\n{FIRST}---\n")
    assert Path(merge("recipe.yaml", "other")).name == "other" and models
    assert output_snapshot(Path("out")).keys() == output_snapshot(Path("other")).keys()
    same = load_all(Path("out"))
    assert all(torch.equal(x, same[name]) for name, x in load_all(Path("other")).items())


@pytest.mark.usefixtures("models")
def test_a_plan_on_stand_ins_is_that_on_the_results(tmp_path: Path) -> None:
    """So that a refusal comes before the first stage, and the work of an interrupted last stage is known again."""
    (tmp_path / "recipe.yaml").write_text(f"{FIRST}---\n{SECOND}---\n{THIRD}")
    planned = plan_merge("recipe.yaml", "out").result
    assert not Path("out.stages").exists()
    merge("recipe.yaml", "out")
    assert planned.stages is not None
    digests = {each.out.name: each.plan.digest for each in planned.stages.plans if isinstance(each, PlannedMerge)}
    assert digests == {name: lock_of(Path("out.stages") / name)["plan"] for name in ("first", "second")}
    assert lock_of(Path("out"))["plan"] == planned.plan.digest


@pytest.mark.usefixtures("models")
def test_unchanged_stages_are_not_made_again(tmp_path: Path) -> None:
    merge("recipe.yaml", "out")
    before = times(Path("out.stages/first")), times(Path("out"))
    again = merge("recipe.yaml", "out")
    assert again.already_there and again.result.stages[0].already_there
    assert (times(Path("out.stages/first")), times(Path("out"))) == before
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("models/a}]", "models/b}]"))
    with pytest.raises(PlanError, match="is not the output of this merge"):
        merge("recipe.yaml", "out")
    assert times(Path("out.stages/first")) == before[0]
    assert not merge("recipe.yaml", "out", overwrite=True).already_there


@pytest.mark.usefixtures("models")
def test_a_changed_stage_is_made_again(tmp_path: Path) -> None:
    """And the last one, which takes its result, if --overwrite allows it; else nothing is."""
    merge("recipe.yaml", "out")
    before = snapshot(tmp_path, times=True)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("{weight: 1}", "{weight: 1, normalize: false}", 1))
    with pytest.raises(PlanError, match="out exists and is not the output of this merge"):
        merge("recipe.yaml", "out")
    after = snapshot(tmp_path, times=True)
    del before["recipe.yaml"], after["recipe.yaml"]
    assert after == before
    outcome = merge("recipe.yaml", "out", overwrite=True)
    assert not outcome.already_there and not outcome.result.stages[0].already_there
    a, b = (load_all(Path(f"models/{name}")) for name in "ab")
    for name, x in load_all(Path("out")).items():
        first = (a[name].double() + b[name].double()).float()
        assert torch.equal(x, ((first.double() + a[name].double()) / 2).float())


def test_a_stage_of_changed_inputs_is_made_again(models: dict[str, Tensors], tmp_path: Path) -> None:
    """A model was trained on: its header is the same."""
    merge("recipe.yaml", "out")
    shutil.rmtree(tmp_path / "models" / "b")
    save_model(tmp_path / "models" / "b", near(models["a"], 9))
    outcome = merge("recipe.yaml", "out", overwrite=True)
    assert not outcome.result.stages[0].already_there
    b = load_all(Path("models/b"))
    for name, x in load_all(Path("out.stages/first")).items():
        assert torch.equal(x, ((models["a"][name].double() + b[name].double()) / 2).float())


@pytest.mark.usefixtures("models")
def test_a_damaged_result_of_a_stage_is_made_again(tmp_path: Path) -> None:
    merge("recipe.yaml", "out")
    expected = snapshot(tmp_path / "out.stages")
    (tmp_path / "out.stages" / "first" / "config.json").write_text("{}")
    merge("recipe.yaml", "out")
    assert snapshot(tmp_path / "out.stages") == expected


@pytest.mark.usefixtures("models")
def test_other_files_in_the_place_of_a_stage_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.stages" / "first").mkdir(parents=True)
    (tmp_path / "out.stages" / "first" / "notes.txt").write_text("mine")
    with pytest.raises(PlanError, match="first exists and is not the output of this merge"):
        merge("recipe.yaml", "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out.stages" / "first").iterdir()] == ["notes.txt"]


@pytest.mark.usefixtures("models")
def test_results_of_stages_are_dropped_at_the_end(tmp_path: Path) -> None:
    merge("recipe.yaml", "out", drop_stages=True)
    assert {path.name for path in tmp_path.iterdir()} == {"models", "recipe.yaml", "out"}
    before = times(Path("out"))
    assert merge("recipe.yaml", "out", drop_stages=True).already_there  # after the first stage is made again
    assert {path.name for path in tmp_path.iterdir()} == {"models", "recipe.yaml", "out"}
    assert times(Path("out")) == before


@pytest.mark.usefixtures("models")
def test_files_that_are_no_stages_are_not_dropped(tmp_path: Path) -> None:
    (tmp_path / "out.stages" / "mine").mkdir(parents=True)
    merge("recipe.yaml", "out", drop_stages=True)
    assert [path.name for path in (tmp_path / "out.stages").iterdir()] == ["mine"]


@pytest.mark.usefixtures("models")
def test_too_little_memory_for_any_stage_is_known_beforehand(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="raise --memory"):
        merge("recipe.yaml", "out", memory=1000)
    assert not (tmp_path / "out.stages").exists()


@pytest.mark.usefixtures("models")
def test_an_input_of_an_earlier_stage_is_never_the_output(tmp_path: Path) -> None:
    before = snapshot(tmp_path / "models")
    with pytest.raises(PlanError, match="lie in one another"):
        merge("recipe.yaml", "models/b", overwrite=True)
    shutil.rmtree(tmp_path / "models" / "b.stages", ignore_errors=True)
    assert snapshot(tmp_path / "models") == before


@pytest.mark.usefixtures("models")
def test_a_failure_of_the_last_stage_shows_before_the_first_runs(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"{RECIPE}keep: {{nothing: drop}}\n")
    with pytest.raises(PlanError, match=r"the last stage: `keep`: 'nothing' is part of no tensor's name"):
        merge("recipe.yaml", "out")
    assert not (tmp_path / "out.stages").exists() and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("models")
def test_stand_ins_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    planned = plan_merge("recipe.yaml", "out")
    (folder,) = (tmp_path / "scratch").iterdir()
    assert sum(path.stat().st_blocks for path in folder.rglob("*.safetensors")) * 512 < 20_000
    del planned
    assert list((tmp_path / "scratch").iterdir()) == []
    (tmp_path / "recipe.yaml").write_text(f"{RECIPE}keep: {{nothing: drop}}\n")
    with pytest.raises(PlanError):
        plan_merge("recipe.yaml", "out")
    assert list((tmp_path / "scratch").iterdir()) == []


# ------------------------------------------------------------------ kills

Run = Callable[..., Any]


@pytest.fixture
def run(models: dict[str, Tensors], cli: Forks, tmp_path: Path) -> Run:
    """`merge recipe.yaml out`; data are synced in small batches. Asserts that it ends well unless it is killed."""
    assert models

    def command(*options: object, **fault: Any) -> Any:
        ran = cli.run("recipe.yaml", "out", "--threads", "1", *options, cwd=tmp_path, sync_bytes=20_000, **fault)
        assert ran.code == (-9 if ran.code < 0 and fault else 0), ran.err
        return ran

    return command


def start_over(folder: Path) -> None:
    for path in folder.glob("out*"):
        shutil.rmtree(path)


@pytest.mark.parametrize("moments", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on(moments: int, run: Run, tmp_path: Path) -> None:
    """The same command then leaves the bytes of an uninterrupted run, and nothing else."""
    (tmp_path / "recipe.yaml").write_text(f"{FIRST}---\n{SECOND}---\n{THIRD}")
    calls = len(run().calls)
    expected = {name: snapshot(tmp_path / name) for name in ("out", "out.stages")}
    for moment in range(moments):
        start_over(tmp_path)
        run(kill_at=1 + moment * calls // moments)
        run()
        assert {name: snapshot(tmp_path / name) for name in expected} == expected
        assert {path.name for path in tmp_path.iterdir()} == {"models", "recipe.yaml", *expected}


def test_killed_in_the_last_stage_the_first_is_not_made_again(run: Run, tmp_path: Path) -> None:
    whole = run()
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    last = max(i for i, call in enumerate(whole.calls, 1) if call.nbytes > 8 and "out.partial" in call.target)
    start_over(tmp_path)
    run(kill_at=last)
    first = times(tmp_path / "out.stages" / "first")
    again = run()
    assert times(tmp_path / "out.stages" / "first") == first
    assert again.bytes_of_weights() < weights / 2


def test_killed_in_the_first_stage_it_goes_on_there(run: Run, tmp_path: Path) -> None:
    whole = run()
    last = max(i for i, call in enumerate(whole.calls, 1) if call.nbytes > 8 and "first.partial" in call.target)
    start_over(tmp_path)
    run(kill_at=last)
    assert not (tmp_path / "out").exists() and any((tmp_path / "out.stages").iterdir())
    assert run().bytes_of_weights() < 0.8 * whole.bytes_of_weights()


def test_killed_while_a_changed_stage_replaces_its_result(run: Run, tmp_path: Path) -> None:
    run()
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("{weight: 1}", "{weight: 1, normalize: false}", 1))
    shutil.copytree(tmp_path / "out.stages", tmp_path / "kept.stages")
    shutil.copytree(tmp_path / "out", tmp_path / "kept")
    calls = len(run("--overwrite").calls)
    expected = snapshot(tmp_path / "out"), snapshot(tmp_path / "out.stages")
    for moment in range(1, calls, calls // 6):
        start_over(tmp_path)
        for name in ("", ".stages"):
            shutil.copytree(tmp_path / f"kept{name}", tmp_path / f"out{name}")
        run("--overwrite", kill_at=moment)
        run("--overwrite")
        assert (snapshot(tmp_path / "out"), snapshot(tmp_path / "out.stages")) == expected
