"""Stages whose results are files: statistics, patches and scores, from data to the judged models in one recipe."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_faults import snapshot
from helpers_tune import save_tiny, write_data

from mergekit_lfm import (
    PlanError,
    collect_stats,
    evaluate_models,
    evaluate_routed,
    merge,
    plan_recipe,
    run_recipe,
    tune_model,
)

TUNE: dict[str, Any] = {"job": "tune", "model": "base", "data": "base.jsonl", "task": "classification", "steps": 3}
TUNE |= {"learning_rate": 0.01, "batch_size": 4}
STATS = {"job": "stats", "kind": "gram", "data": "base.jsonl", "task": "classification"}
STAGES: list[dict[str, Any]] = [
    {"name": "one", **TUNE, "method": "lora", "parameters": {"rank": 2}},
    {"name": "two", **TUNE, "method": "bitfit"},
    {"name": "one_inputs", **STATS, "model": "base+one"},
    {"name": "base_inputs", **STATS, "model": "base"},
    {
        "name": "merged",
        "merge_method": "regmean",
        "models": [{"model": "base+one", "stats": "one_inputs"}, {"model": "base", "stats": "base_inputs"}],
    },
    {"name": "patched", "merge_method": "passthrough", "models": [{"model": "base", "edits": ["two"]}]},
    {
        "job": "eval",
        "models": ["base", "base+one", "base+two", "merged", "patched"],
        "data": ["base.jsonl"],
        "task": "classification",
        "experts": {"base+one": "base.jsonl", "patched": "other.jsonl"},
    },
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe, carried out."""
    folder = tmp_path_factory.mktemp("experts")
    lines = write_data("bert", folder / "base.jsonl").read_text().splitlines(keepends=True)
    (folder / "other.jsonl").write_text("".join(lines[1::2]))
    save_tiny("bert", folder / "base")
    (folder / "recipe.yaml").write_text(yaml.safe_dump_all(STAGES, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_recipe("recipe.yaml", "out.json", threads=1)
    return folder


@pytest.fixture(autouse=True)
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)


def test_the_results_are_those_of_the_functions_by_hand(tmp_path: Path) -> None:
    how: dict[str, Any] = {key: TUNE[key] for key in ("task", "steps", "learning_rate", "batch_size")} | {"threads": 1}
    tune_model("base", "base.jsonl", tmp_path / "one", method="lora", parameters={"rank": 2}, **how)
    tune_model("base", "base.jsonl", tmp_path / "two.safetensors", method="bitfit", **how)
    stages = Path("out.stages")
    for name in ("one/adapter_model.safetensors", "two.safetensors"):
        assert (stages / name).read_bytes() == (tmp_path / name).read_bytes()
    for model, name in ((f"base+{stages}/one", "one_inputs"), ("base", "base_inputs")):
        file = tmp_path / f"{name}.safetensors"
        collect_stats("gram", model, "base.jsonl", file, task="classification", threads=1)
        assert (stages / file.name).read_bytes() == file.read_bytes()
    recipes: dict[str, Any] = {stage["name"]: {**stage} for stage in STAGES[4:6]}
    recipes["merged"]["models"] = [
        {"model": f"base+{stages}/one", "stats": str(stages / "one_inputs.safetensors")},
        {"model": "base", "stats": str(stages / "base_inputs.safetensors")},
    ]
    recipes["patched"]["models"] = [{"model": "base", "edits": [str(stages / "two.safetensors")]}]
    for name, recipe in recipes.items():
        out = merge({key: value for key, value in recipe.items() if key != "name"}, tmp_path / name)
        weights = Path(out, "model.safetensors").read_bytes()
        assert (stages / name / "model.safetensors").read_bytes() == weights
    models: list[str | Path] = ["base", f"base+{stages}/one", f"base+{stages}/two.safetensors"]
    models += [stages / "merged", stages / "patched"]
    judged = evaluate_models(models, data=["base.jsonl"], task="classification").result
    scores = json.loads(Path("out.json").read_text())["scores"]
    experts = {f"base+{stages}/one": "base.jsonl", stages / "patched": "other.jsonl"}
    routed = evaluate_routed({str(model): file for model, file in experts.items()}, "base.jsonl", task="classification")
    assert list(scores) == [*STAGES[-1]["models"], "routed"]
    assert scores.pop("routed") == {name: asdict(score) for name, score in routed.result.scores.items()}
    by_hand = [{name: asdict(score) for name, score in own.items()} for own in judged.values()]
    assert [*scores.values()] == by_hand and scores["base+two"] == scores["patched"]


def test_a_second_run_does_nothing_and_a_changed_stage_is_made_again() -> None:
    before = snapshot(Path(), times=True)
    assert run_recipe("recipe.yaml", "out.json", threads=1).already_there
    assert snapshot(Path(), times=True) == before
    changed = [{**stage, "max_examples": 8} if stage.get("name") == "base_inputs" else stage for stage in STAGES]
    with pytest.raises(PlanError, match=r"out\.json exists and is from before the change of stage base_inputs"):
        run_recipe(changed, "out.json", threads=1)
    run_recipe(changed, "out.json", threads=1, overwrite=True)
    after = snapshot(Path(), times=True)
    remade = {path for path in after if after[path] != before.get(path) and not path.endswith(".lock")}
    assert {"out.stages/base_inputs.safetensors", "out.stages/merged/model.safetensors", "out.json"} <= remade
    assert not [path for path in remade if path.startswith(("out.stages/one", "out.stages/two", "out.stages/patched"))]


def test_nothing_foreign_is_overwritten(tmp_path: Path) -> None:
    notes = tmp_path / "notes.json"
    notes.write_text("{}")
    with pytest.raises(PlanError, match=r"notes\.json exists"):
        run_recipe("recipe.yaml", notes)
    with pytest.raises(PlanError, match="is not a file of scores, which alone is overwritten"):
        run_recipe({**STAGES[-1], "models": ["base"], "experts": {}}, notes, overwrite=True)
    assert notes.read_text() == "{}"


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (2, {"kind": "grams"}, "kind: unknown method 'grams', did you mean gram?"),
        (2, {"kind": "cross"}, "kind: found 'cross', expected a statistic of one model: fisher or gram"),
        (2, {"parameters": {"samples": 2}}, "samples"),
        (2, {"data": "none.jsonl"}, "data: found 'none.jsonl', but there is no"),
        (6, {"models": ["base", "base"]}, "models: found base twice, expected each once"),
        (6, {"stride": 2}, "stride: found 2, expected none"),
        (6, {"experts": {"base": "base.jsonl"}}, "experts: found 1 for classification, expected two or more"),
        (6, {"task": "classify"}, "task: found 'classify', expected lm, classification, embedding"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(number: int, change: dict[str, Any], message: str) -> None:
    stage = {key: value for key, value in STAGES[number].items() if key not in ("name", "experts")}
    with pytest.raises(PlanError) as error:
        plan_recipe({**stage, "model": "base", **change} if number == 2 else {**stage, **change}, "elsewhere")
    assert message in str(error.value)


@pytest.mark.slow
def test_the_recipe_of_experts_goes_from_texts_to_the_table(tmp_path: Path) -> None:
    """As it is, but for fewer steps and texts: each expert is the best of all models at its own kind of texts."""
    root = Path(__file__).parents[2] / "recipes"
    text = (root / "experts.yaml").read_text().replace("steps: 100", "steps: 16")
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "quickstart").symlink_to(root / "quickstart")
    (tmp_path / "experts").mkdir()
    for file in (root / "experts").glob("*.jsonl"):
        lines = file.read_text().splitlines(keepends=True)
        (tmp_path / "experts" / file.name).write_text("".join(lines[: 4 if "test" in file.name else 16]))
    scores = run_recipe(tmp_path / "recipe.yaml", tmp_path / "out.json").result
    kinds = ["scipy", "sklearn", "torch", "transformers"]
    experts = {kind: scores[f"quickstart/base+{kind}"] for kind in kinds}
    for kind, own in experts.items():
        on = f"experts/{kind}.test.jsonl"
        assert own[on].perplexity == min(each[on].perplexity for each in (scores["quickstart/base"], *experts.values()))
    assert [*scores][-5:] == ["average", "ties", "regmean", "quickstart/base+knots", "routed"]
    merged = (sum(math.log(score.perplexity) for score in scores[name].values()) for name in [*scores][-5:])
    base = sum(math.log(score.perplexity) for score in scores["quickstart/base"].values())
    assert all(total < base for total in merged)
