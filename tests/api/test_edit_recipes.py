"""Recipes that edit facts before a merge or in its result: the same bytes as with the patch files, made once."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers_editing import tiny_model, trained_tokenizer
from safetensors.torch import load_file

from mergekit_lfm import apply_patches, merge, undo_patches
from mergekit_lfm.api import prepare as stages_module
from mergekit_lfm.commands.app import main
from mergekit_lfm.commands.merge import merge as merge_command
from mergekit_lfm.commands.show.plans import plan_data
from mergekit_lfm.edit.solve import edit
from mergekit_lfm.errors import PlanError
from mergekit_lfm.output.lock import verify
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.runtime.load import load_model

RECIPE = Path(__file__).parents[2] / "recipes" / "facts_edited.yaml"
OPTIONS: dict[str, Any] = {"layers": [1, 2], "lr": 0.1, "steps": 6, "lambda": 1.0, "covariance": "identity"}


def fact(subject: str, target: str) -> dict[str, Any]:
    return {"prompt": "{} was born in the city of", "subject": subject, "target_new": target}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, another with its names, and two facts files."""
    place = tmp_path_factory.mktemp("recipes")
    model = tiny_model("gpt2", torch.float32)
    for name in ("m", "n"):
        model.to(torch.bfloat16).save_pretrained(place / name)
        trained_tokenizer().save_pretrained(place / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.125)
    (place / "one.yaml").write_text(yaml.safe_dump({"facts": [fact("Ada Blake", "Rome")]}))
    (place / "two.yaml").write_text(yaml.safe_dump({"facts": [fact("Leo Wagner", "Paris")]}))
    return place


def request(place: Path, name: str) -> dict[str, Any]:
    return {"facts": str(place / name), "method": "memit", **OPTIONS}


def contents(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def test_facts_beside_a_model_are_its_patch(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"lambda_" if name == "lambda" else name: value for name, value in OPTIONS.items()}
    for name in ("one", "two"):
        loaded = load_model(folder / "m", "lm")
        edit(loaded, None, folder / f"{name}.yaml", **options).save(tmp_path / f"{name}.safetensors")

    def recipe(*edits: Any) -> dict[str, Any]:
        models = [{"model": str(folder / "m"), "edits": [each]} for each in edits]
        return {
            "merge_method": "task_arithmetic",
            "base_model": str(folder / "m"),
            "models": models,
            "parameters": {"weight": 1.0},
        }

    asked = recipe(*(request(folder, f"{name}.yaml") for name in ("one", "two")))
    given = recipe(*(str(tmp_path / f"{name}.safetensors") for name in ("one", "two")))
    merge(asked, tmp_path / "asked")
    merge(given, tmp_path / "given")
    found, expected = contents(tmp_path / "asked"), contents(tmp_path / "given")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    changed = {name for name, x in contents(folder / "m").items() if not torch.equal(x, found[name])}
    assert changed == {f"transformer.h.{layer}.mlp.c_proj.weight" for layer in (1, 2)}
    assert verify(tmp_path / "asked") == []
    lock = json.loads((tmp_path / "asked" / "merge.lock.json").read_text())
    assert lock["recipe"]["models"][0]["edits"] == [{**request(folder, "one.yaml"), "facts": "one.yaml"}]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("edited again")

    monkeypatch.setattr(stages_module, "edit", refuse)
    merge(asked, tmp_path / "asked")  # cached already
    merge({**asked, "parameters": {"weight": 0.5}}, tmp_path / "half")  # the patches are cached


def test_facts_at_the_top_are_edited_in_the_result(folder: Path, tmp_path: Path) -> None:
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(folder / name)} for name in ("m", "n")],
        "parameters": {"weight": 1.0},
    }
    merge(recipe, tmp_path / "plain")
    options = {"lambda_" if name == "lambda" else name: value for name, value in OPTIONS.items()}
    patch = edit(load_model(tmp_path / "plain", "lm"), None, folder / "one.yaml", **options)
    patch.save(tmp_path / "p.safetensors")
    merge({**recipe, "edits": [request(folder, "one.yaml")]}, tmp_path / "asked")
    merge({**recipe, "edits": [str(tmp_path / "p.safetensors")]}, tmp_path / "given")
    found, expected, plain = (contents(tmp_path / name) for name in ("asked", "given", "plain"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {name for name in plain if not torch.equal(plain[name], found[name])} == set(patch.info.tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked", "given", "p.safetensors", "plain"]
    assert verify(tmp_path / "asked") == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "gpt2-square", "qwen3-tied", "gpt-j"])
def test_an_edit_of_a_real_model_is_undone_to_the_byte(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights stored [in, out] and [out, in], heads tied and not, several shards."""
    tiny_model(name, torch.float32).to(dtype).save_pretrained(tmp_path / "m", max_shard_size="40KB")
    trained_tokenizer().save_pretrained(tmp_path / "m")
    options = {"lambda_" if key == "lambda" else key: value for key, value in OPTIONS.items()}
    patch = edit(load_model(tmp_path / "m", "lm"), None, {"facts": [fact("Ada Blake", "Rome")]}, **options)
    patch.save(tmp_path / "p.safetensors")
    apply_patches(tmp_path / "m", [tmp_path / "p.safetensors"], tmp_path / "edited")
    undo_patches(tmp_path / "edited", tmp_path / "back")
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 1
    sames = [
        {file: (tmp_path / out / file).read_bytes() == (tmp_path / "m" / file).read_bytes() for file in files}
        for out in ("edited", "back")
    ]
    assert not all(sames[0].values()) and all(sames[1].values())
    before, after = (load_model(tmp_path / out, "lm").model for out in ("m", "edited"))
    layers = {layer: after.get_parameter(layer) - before.get_parameter(layer) for layer in patch.info.tensors}
    for layer, change in layers.items():
        scale = before.get_parameter(layer).abs().max() * torch.finfo(dtype).eps
        assert (change - patch.change(layer)).abs().max() <= 2 * scale


def test_a_plan_needs_no_model_and_its_digest_knows_the_facts(folder: Path, tmp_path: Path) -> None:
    facts = tmp_path / "facts.yaml"
    facts.write_text((folder / "one.yaml").read_text())

    def plan(**more: Any) -> Any:
        line = {"model": str(folder / "m"), "edits": [{**request(folder, "one.yaml"), "facts": str(facts), **more}]}
        return make_plan(Recipe.parse({"merge_method": "passthrough", "models": [line]}))

    first = plan()
    assert first.unedited and plan_data(first)["edited"]
    assert plan().digest == first.digest
    assert plan(steps=7).digest != first.digest
    facts.write_text((folder / "two.yaml").read_text())
    assert plan().digest != first.digest


@pytest.mark.slow
def test_the_recipe_of_facts_runs_as_its_comment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """recipes/facts_edited.yaml, on a model after little training."""
    (tmp_path / "recipes" / "facts").mkdir(parents=True)
    shutil.copy(RECIPE, tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    import_module("recipes.make.facts").make_facts(Path("recipes/facts"), steps=2)
    comment = RECIPE.read_text("utf-8").replace("\\\n#", "")
    lines = [line.removeprefix("#").split() for line in comment.splitlines() if "mergekit-lfm stats" in line]
    (stats,) = lines
    for command, arguments in ((main, stats[1:]), (merge_command, ["recipes/facts_edited.yaml"])):
        done = CliRunner().invoke(command, [*arguments, "-q"])
        assert done.exit_code == 0, done.output
    found, base = contents(Path("merged/facts_edited")), contents(Path("recipes/facts/model"))
    changed = {name for name in base if not torch.equal(found[name], base[name])}
    assert changed == {"transformer.h.0.mlp.c_proj.weight"}
    assert verify(Path("merged/facts_edited")) == []


def test_errors_in_a_request_are_reported_before_any_work(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("facts: [{prompt: no blank, subject: Ada, target_new: Rome}]")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "memmit"}, "did you mean memit"),
        ({"step": 3}, "did you mean steps"),
        ({"steps": 0}, "at least 1"),
        ({"facts": str(tmp_path / "bad.yaml")}, "exactly once"),
        ({"layers": [2, 1]}, "ascending"),
    ]
    for more, message in cases:
        line = {"model": str(folder / "m"), "edits": [{**request(folder, "one.yaml"), **more}]}
        with pytest.raises(PlanError, match=message):
            merge({"merge_method": "passthrough", "models": [line]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
