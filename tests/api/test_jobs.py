"""Jobs as recipes and as stages: planned on stand-ins, carried out once, and the same bytes as by hand."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_extract import CONFIG, SHAPES, draw, save_trio
from helpers_faults import Forks, snapshot
from helpers_tune import save_tiny, write_data
from models import files_of, save_checkpoint
from safetensors.torch import load_file
from transformers import ResNetConfig, ResNetForImageClassification

from mergekit_lfm import (
    PlanError,
    extract_lora,
    merge,
    merge_adapters,
    open_checkpoint,
    plan_recipe,
    run_recipe,
    verify_output,
)
from mergekit_lfm.api import adapters
from mergekit_lfm.api.jobs import JOBS
from mergekit_lfm.api.planned import PlannedJob, PlannedMerge
from mergekit_lfm.artifacts.adapter import open_adapter
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.views.adapted import open_model

RECIPE = """
name: from_one
job: extract
model: one
base_model: base
rank: 4
---
name: from_two
job: extract
model: two
base_model: base
rank: 3
---
name: both
job: adapters
merge_method: ties
adapters: [{adapter: from_one}, {adapter: from_two}]
base_model: base
parameters: {weight: 1, density: 0.5}
space: knots
rank: 5
---
merge_method: passthrough
models: [{model: base, adapter: both}]
"""
NAMES = ["from_one", "from_two", "both"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a base, two fine-tunes, and a recipe of four stages."""
    save_trio(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(old: str, new: str) -> None:
    text = Path("recipe.yaml").read_text()
    assert old in text
    Path("recipe.yaml").write_text(text.replace(old, new, 1))


def times(folder: str) -> dict[str, int]:
    return {path.name: path.stat().st_ctime_ns for path in Path(folder).iterdir()}


def already_there(outcome: Any) -> list[bool]:
    return [stage.already_there for stage in outcome.result.stages]


def test_stages_with_jobs_give_the_bytes_of_their_functions_by_hand() -> None:
    outcome = run_recipe("recipe.yaml", "out")
    assert [stage.path for stage in outcome.result.stages] == [Path("out.stages", name) for name in NAMES]
    extract_lora("one", "base", "by_hand/from_one", rank=4)
    extract_lora("two", "base", "by_hand/from_two", rank=3)
    for name in ("from_one", "from_two"):
        assert files_of(Path("out.stages", name)) == files_of(Path("by_hand", name))
    how: dict[str, Any] = {"method": "ties", "density": 0.5, "space": "knots", "rank": 5, "base": "base"}
    merge_adapters(["by_hand/from_one", "by_hand/from_two"], "by_hand/both", **how)
    merge({"merge_method": "passthrough", "models": [{"model": "base+by_hand/both"}]}, "by_hand/out")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert Path("out.stages/both", file).read_bytes() == Path("by_hand/both", file).read_bytes()
    assert Path("out/model.safetensors").read_bytes() == Path("by_hand/out/model.safetensors").read_bytes()
    for folder in ("out", *(f"out.stages/{name}" for name in NAMES)):
        assert verify_output(folder).result.differences == ()


def test_the_output_has_the_product_of_the_adapter_that_a_stage_made() -> None:
    run_recipe("recipe.yaml", "out")
    factors = {name: x.double() for name, x in load_file("out.stages/both/adapter_model.safetensors").items()}
    out, base = load_file("out/model.safetensors"), draw(0)
    for name in (name for name, shape in SHAPES.items() if len(shape) == 2):
        module = f"base_model.model.{name.removesuffix('.weight')}"
        change = factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
        torch.testing.assert_close(out[name].double(), base[name].double() + change, atol=1e-6, rtol=1e-6)
        assert change.abs().max() > 0.1


def test_a_second_run_does_nothing() -> None:
    run_recipe("recipe.yaml", "out")
    before = snapshot(Path(), times=True)
    again = run_recipe("recipe.yaml", "out")
    assert again.already_there and already_there(again) == [True, True, True]
    assert snapshot(Path(), times=True) == before


def test_a_changed_rank_runs_its_stage_and_those_after_it() -> None:
    run_recipe("recipe.yaml", "out")
    before = times("out.stages/from_one")
    change("rank: 3", "rank: 2")
    outcome = run_recipe("recipe.yaml", "out", overwrite=True)
    assert already_there(outcome) == [True, False, False] and not outcome.already_there
    assert times("out.stages/from_one") == before
    (module, *_) = open_adapter(Path("out.stages/from_two")).modules
    assert module.parts["lora_A"].shape == (2, 10)


def test_an_output_from_before_the_change_is_refused_before_a_stage_runs() -> None:
    run_recipe("recipe.yaml", "out")
    change("rank: 3", "rank: 2")
    before = snapshot(Path(), times=True)
    with pytest.raises(PlanError, match=r"^out exists and is from before the change of stage from_two; .* --overwrite"):
        run_recipe("recipe.yaml", "out")
    assert snapshot(Path(), times=True) == before


def test_a_damaged_result_is_made_again() -> None:
    run_recipe("recipe.yaml", "out")
    expected = snapshot(Path("out.stages"))
    Path("out.stages/from_two/adapter_config.json").write_text("{}")
    shutil.rmtree("out.stages/both")
    outcome = run_recipe("recipe.yaml", "out")
    assert already_there(outcome) == [True, False, False] and outcome.already_there
    assert snapshot(Path("out.stages")) == expected


def test_a_stage_that_was_a_merge_may_become_a_job(here: Path) -> None:
    (here / "merges.yaml").write_text(
        "name: both\nmodels: [{model: one}, {model: two}]\nmerge_method: linear\nparameters: {weight: 1}\n---\n"
        "merge_method: passthrough\nmodels: [{model: both}]\n"
    )
    run_recipe("merges.yaml", "out")
    run_recipe("recipe.yaml", "out", overwrite=True)
    assert Path("out.stages/both/adapter_config.json").exists()
    run_recipe("merges.yaml", "out", overwrite=True)
    assert verify_output("out.stages/both").result.differences == ()


def test_an_interrupted_run_goes_on_with_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(adapters, "_merge_module", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_recipe("recipe.yaml", "out")
    assert {path.name for path in Path("out.stages").iterdir()} == {"from_one", "from_two"}
    assert already_there(run_recipe("recipe.yaml", "out")) == [True, True, False]


@pytest.mark.parametrize("moments", [2, pytest.param(15, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on(moments: int, cli: Forks, here: Path) -> None:
    """The same command then leaves the bytes of an uninterrupted run, and nothing else."""

    def command(**fault: Any) -> Any:
        ran = cli.run("recipe.yaml", "out", "--threads", "1", cwd=here, **fault)
        assert ran.code == (-9 if ran.code < 0 and fault else 0), ran.err
        return ran

    calls = len(command().calls)
    expected = snapshot(here)
    for moment in range(moments):
        shutil.rmtree(here / "out.stages")
        shutil.rmtree(here / "out")
        command(kill_at=1 + (2 * moment + 1) * calls // (2 * moments))
        command()
        assert snapshot(here) == expected


def test_results_are_dropped_at_the_end(here: Path) -> None:
    for _ in range(2):
        run_recipe("recipe.yaml", "out", drop_stages=True)
        assert {path.name for path in here.iterdir()} == {"base", "one", "two", "recipe.yaml", "out"}


def test_a_job_may_make_the_output() -> None:
    text = RECIPE.rpartition("---")[0].replace("name: both\n", "")
    Path("recipe.yaml").write_text(text)
    outcome = run_recipe("recipe.yaml", "out", drop_stages=True)
    assert not Path("out.stages").exists()
    assert (Path(outcome), {module.rank for module in outcome.result.modules}) == (Path("out"), {5})
    assert run_recipe("recipe.yaml", "out").already_there
    with pytest.raises(PlanError, match=r"the last stage: job adapters makes an adapter, expected a merge"):
        merge("recipe.yaml", "out")


def test_a_job_may_take_the_result_of_a_merge() -> None:
    Path("recipe.yaml").write_text(
        "name: mean\nmerge_method: linear\nmodels: [{model: one}, {model: two}]\nparameters: {weight: 1}\n---\n"
        "job: extract\nmodel: mean\nbase_model: base\nrank: 10\n"
    )
    run_recipe("recipe.yaml", "out")
    found, one, two = open_model("base+out"), draw(1), draw(2)
    base = draw(0)
    for name, x in base.items():
        expected = x.double() + 0.3 * (one[name].double() + two[name].double()) / 2
        torch.testing.assert_close(found.read(name).double(), expected.flatten(), atol=1e-5, rtol=1e-5)


def test_a_mistake_in_the_last_stage_shows_before_the_first_runs(here: Path) -> None:
    wide = {name: torch.ones(*shape[:-1], shape[-1] + 1) for name, shape in SHAPES.items()}
    save_checkpoint(here / "wide", wide, CONFIG)
    before = snapshot(here)
    change("models: [{model: base, adapter: both}]", "models: [{model: wide, adapter: both}]")
    with pytest.raises(PlanError, match=r"the last stage: both does not fit wide"):
        run_recipe("recipe.yaml", "out")
    change("parameters: {weight: 1, density: 0.5}", "parameters: {weight: 1, density: [{filter: k_, value: 1}]}")
    with pytest.raises(PlanError, match=r"stage both: parameters.density: filter 'k_' is part of no tensor's name"):
        run_recipe("recipe.yaml", "out")
    assert {**snapshot(here), "recipe.yaml": None} == {**before, "recipe.yaml": None}


def test_a_stand_in_is_like_the_result_but_for_its_data() -> None:
    planned = plan_recipe("recipe.yaml", "out").result
    assert isinstance(planned, PlannedMerge) and planned.stages is not None
    stand_ins = {name: planned.stages.scratch.path / name for name in NAMES}
    assert sum(file.stat().st_blocks for folder in stand_ins.values() for file in folder.rglob("*")) * 512 < 60_000
    run_recipe(planned)
    for name, folder in stand_ins.items():
        expected, found = (open_adapter(path) for path in (Path("out.stages", name), folder))
        assert found.modules == expected.modules
        config = {key: value for key, value in expected.config.items() if key != "modules_to_save"}
        assert {key: value for key, value in found.config.items() if key != "modules_to_save"} == config


@pytest.mark.parametrize("choice", ["energy: 0.8", "size: 3KB"])
def test_ranks_that_data_decide_are_known_to_the_stages_after(choice: str) -> None:
    """The plan on stand-ins has the largest ranks; the output is that of the true ones, and known again."""
    change("rank: 4", choice)
    first = run_recipe("recipe.yaml", "out")
    ranks = {module.parts["lora_A"].shape[0] for module in open_adapter(Path("out.stages/from_one")).modules}
    assert max(ranks) < 10
    assert run_recipe("recipe.yaml", "out").already_there
    assert first.digest == run_recipe("recipe.yaml", "out").digest


def test_options_of_the_plan_hold_for_stages_when_they_run() -> None:
    Path("recipe.yaml").write_text(
        "name: x\nmerge_method: dare_linear\nbase_model: base\nmodels: [{model: one}]\n"
        "parameters: {weight: 1, density: 0.5}\n---\nmerge_method: passthrough\nmodels: [{model: x}]\n"
    )
    run_recipe(plan_recipe("recipe.yaml", "planned", seed=5).result)
    merge("recipe.yaml", "at_once", seed=5)
    merge("recipe.yaml", "other")
    planned, at_once, other = (Path(out, "model.safetensors").read_bytes() for out in ("planned", "at_once", "other"))
    assert planned == at_once != other


def test_the_recipe_of_a_job_alone_may_have_a_name() -> None:
    first, *_ = yaml.safe_load_all(RECIPE)
    assert Path(run_recipe(first, "out")).name == "out"
    with pytest.raises(PlanError, match="no output: give OUT"):
        run_recipe(first)
    assert run_recipe({**first, "output": "there"}).path == Path("there")


def test_an_argument_that_no_recipe_has_is_an_error() -> None:
    first, *_ = yaml.safe_load_all(RECIPE)
    for call in (plan_recipe, run_recipe):
        with pytest.raises(TypeError, match="unexpected arguments: overwrit"):
            call(first, "out", overwrit=True)


def test_the_result_of_a_job_is_not_pushed(here: Path) -> None:
    recipe = {"job": "extract", "model": "one", "base_model": "base", "rank": 2}
    with pytest.raises(PlanError, match="push_to: found 'org/name', but what a job makes is not pushed"):
        run_recipe(recipe, "unpushed", push_to="org/name")
    assert not (here / "unpushed").exists()


def test_the_example_of_the_docs_runs_on_models_with_a_tied_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "merging.md").read_text().partition("### Jobs: stages besides merges\n")[2]
    block = "\n".join(line[4:] for line in text.partition("\nA document without")[0].strip("\n").split("\n"))
    (tmp_path / "user").mkdir()
    monkeypatch.chdir(tmp_path / "user")
    for name in ("base", "docs"):
        Path(name).symlink_to(root / "recipes" / "quickstart" / name)
    extract_lora(root / "recipes" / "quickstart" / "code", "./base", "code-lora", rank=8)
    Path("r.yaml").write_text(block)
    run_recipe("r.yaml", "out")
    assert open_checkpoint("out").keys() == open_checkpoint("base").keys()
    assert not torch.equal(*(load_file(f"{name}/model.safetensors")["model.norm.weight"] for name in ("out", "base")))


def test_a_merge_alone_is_one_in_run_recipe_too() -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": "one"}]}
    assert run_recipe(recipe, "out").digest == merge(recipe, "out").digest == plan_recipe(recipe, "out").digest
    assert run_recipe(Recipe.parse(recipe), "out").already_there


@pytest.mark.parametrize("name", ["extrac", "distil", 5])
def test_an_unknown_job_is_refused(name: object) -> None:
    with pytest.raises(PlanError, match=rf"recipe: job {name}: expected {' or '.join(JOBS)}, or no"):
        run_recipe({"job": name, "model": "one"}, "out")


SUFFIXES = {"generate": ".jsonl", "synthesise": ".npz"}  # of outputs that must have one


def job_plan(name: str) -> PlannedJob:
    documents: dict[str, dict[str, Any]] = {
        "distill": {"job": "distill", "model": "encoder", "teachers": "encoder", "data": "pairs.jsonl"},
        "extract": {"job": "extract", "model": "one", "base_model": "base"},
        "adapters": {"job": "adapters", "merge_method": "cat", "adapters": [{"adapter": "lora"}], "base_model": "base"},
        "generate": {"job": "generate", "model": "llama", "count": 3, "max_new_tokens": 4},
        "head": {"job": "head", "model": "encoder", "labels": 3},
        "meta": {"job": "meta", "model": "encoder", "data": ["pairs.jsonl"] * 2, "shots": 2, "queries": 2},
        "stats": {"job": "stats", "kind": "gram", "model": "encoder", "data": "pairs.jsonl", "task": "embedding"},
        "eval": {"job": "eval", "models": "encoder", "data": "pairs.jsonl", "task": "embedding"},
        "student": {"job": "student", "model": "encoder", "layers": [1], "mlp": 0.5},
        "synthesise": {"job": "synthesise", "teachers": "images", "size": 8, "count": 4, "rounds": 1},
        "tune": {"job": "tune", "model": "encoder", "data": "pairs.jsonl", "task": "embedding", "steps": 2},
    }
    if name in ("distill", "head", "meta", "student", "tune", "stats", "eval"):
        for each in ("distill", "meta"):
            documents[each] |= {"task": "embedding", "steps": 2}
        save_tiny("encoder", Path("encoder"))
        write_data("encoder", Path("pairs.jsonl"))
    if name == "generate":
        save_tiny("llama", Path("llama"))
    if name == "synthesise":
        sizes: dict[str, Any] = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "num_labels": 3}
        config = ResNetConfig(**sizes, num_channels=1, layer_type="basic")
        ResNetForImageClassification(config).save_pretrained("images")
    if name == "adapters":
        extract_lora("two", "base", "lora", rank=2)
        documents[name]["parameters"] = {"weight": 1}
    planned = plan_recipe(documents[name], f"out{SUFFIXES.get(name, '')}").result
    assert isinstance(planned, PlannedJob)
    return planned


@pytest.mark.parametrize("name", JOBS)
def test_every_job_keeps_the_promises_of_its_declaration(name: str) -> None:
    """A stand-in that opens, a lock that verifies, a module that prints it, and an output that is written once."""
    from mergekit_lfm.commands.jobs import show_of

    planned = job_plan(name)
    planned.plan.stand_in(Path("stand-in"))
    makes_adapter, makes_file = name in ("adapters", "extract"), name in ("stats", "eval", *SUFFIXES)
    if name == "synthesise":
        assert Path("stand-in").read_bytes()[:2] == b"PK"
    elif name in ("eval", "generate"):
        assert Path("stand-in").read_text() == {"eval": "", "generate": '{"text": "."}\n'}[name]
    else:
        assert open_adapter(Path("stand-in")).modules if makes_adapter else dict(open_checkpoint("stand-in"))
    show = show_of(planned.job)
    assert str(planned.out) in show.plan_text(planned.plan) and show.plan_data(planned.plan)["recipe"]["job"] == name
    outcome = run_recipe(planned)
    assert run_recipe(planned).already_there and (makes_file or verify_output("out").result.differences == ())
    if not (makes_adapter or name in ("eval", *SUFFIXES)):
        alike = set(open_checkpoint("out").values()) <= set(open_checkpoint("stand-in").values())
        assert alike and (name == "stats" or dict(open_checkpoint("out")) == dict(open_checkpoint("stand-in")))
    words = {
        "distill": "trained",
        "head": "new: ",
        "meta": "trained",
        "tune": "trained",
        "stats": "layers",
        "eval": "top-1",
        "generate": "3 texts",
        "synthesise": "4 images",
    }
    word = words.get(name, "kept")
    assert word in show.done_text(outcome) and show.done_data(outcome)["out"] == str(planned.out)


def test_an_extraction_is_planned_without_torch() -> None:
    code = (
        "import sys; from mergekit_lfm import plan_recipe\n"
        "plan_recipe({'job': 'extract', 'model': 'one', 'base_model': 'base'}, 'out')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_device_that_is_not_there_is_refused_by_the_plan() -> None:
    recipe = {"job": "extract", "model": "one", "base_model": "base"}
    with pytest.raises(PlanError, match="the device 'cuda:99' cannot be used here"):
        plan_recipe(recipe, "out", device="cuda:99")
    planned = plan_recipe(recipe, "out", device="auto").result
    assert isinstance(planned, PlannedJob) and planned.job.name == "extract"


def test_a_stand_in_without_products_has_all_that_may_be_saved() -> None:
    planned = plan_recipe({"job": "extract", "model": "one", "base_model": "base", "save": "."}, "out").result
    assert isinstance(planned, PlannedJob)
    planned.plan.stand_in(Path("stand-in"))
    assert open_checkpoint("stand-in", adapter=True).keys() == {f"base_model.model.{name}" for name in SHAPES}
