"""Recipes that are proposed for models: the base, the method, the reasons, and that they plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_commands import answer, refusal, run
from models import save_checkpoint
from safetensors.torch import save_file

from mergekit_lfm import PlanError, Recipe, init_recipe, plan_merge


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(name: str, card: str = "", **config: Any) -> str:
    tensors = {"model.embed_tokens.weight": torch.ones(4, 2), "norm": torch.ones(2, dtype=torch.bfloat16)}
    facts = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 4}
    save_checkpoint(Path(name), tensors, {**facts, **config})
    if card:
        Path(name, "README.md").write_text(f"---\n{card}\n---\n# {name}\n")
    return name


def proposal(*models: str) -> dict[str, Any]:
    """The proposed recipe, which parses and plans."""
    outcome = init_recipe(models, "recipe.yaml")
    assert Path("recipe.yaml").read_text() == outcome.result
    assert plan_merge("recipe.yaml", "out").result.plan.tensors
    data: dict[str, Any] = yaml.safe_load(outcome.result)
    return data


def names(data: dict[str, Any]) -> list[str]:
    return [line["model"] for line in data["models"]]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_models_without_a_base(count: int) -> None:
    models = [save(f"m{i}") for i in range(count)]
    data = proposal(*models)
    assert data["merge_method"] == ["passthrough", "slerp", "linear"][count - 1] and names(data) == models
    assert ("base_model" in data) == (count == 2)
    assert data.get("dtype") == (None if count == 1 else "float32")


@pytest.mark.parametrize("how", ["card", "card list", "config", "path"])
def test_the_base_is_the_model_that_the_others_name(how: str, folder: Path) -> None:
    save("org/base") if how != "path" else save("base")
    base = "base" if how == "path" else "org/base"
    said: dict[str, dict[str, Any]] = {
        "card": {"card": "base_model: org/base"},
        "card list": {"card": "base_model:\n- org/base"},
        "config": {"_name_or_path": "org/base"},
        "path": {"_name_or_path": str(folder / "base")},
    }
    tunes = [save(name, **said[how]) for name in ("a", "b")]
    data = proposal(tunes[0], base, tunes[1])
    assert data["merge_method"] == "ties" and data["base_model"] == base and names(data) == tunes
    text = Path("recipe.yaml").read_text()
    place = "card" if how.startswith("card") else "config"
    assert f"# {base} is named as the base by the {place} of a, the {place} of b." in text
    Path("recipe.yaml").unlink()
    assert proposal(base, "a")["merge_method"] == "task_arithmetic"


def test_a_downloaded_base_is_known_by_the_last_part_of_its_name() -> None:
    save("Base-7B")
    save("tune", "base_model: someone/base-7b")
    assert proposal("Base-7B", "tune")["base_model"] == "Base-7B"


def test_a_base_on_the_hub_that_all_name_is_proposed() -> None:
    models = [save(name, "base_model: org/base") for name in "ab"]
    data = yaml.safe_load(init_recipe(models).result)
    assert (data["merge_method"], data["base_model"], names(data)) == ("ties", "org/base", models)


def test_parents_of_a_merge_are_not_its_base() -> None:
    save("x")
    save("merged", "base_model: [x, y]\nbase_model_relation: merge")
    assert proposal("x", "merged")["merge_method"] == "slerp"


def test_two_that_name_each_other_have_no_base() -> None:
    save("a", "base_model: b")
    save("b", "base_model: a")
    assert proposal("a", "b")["merge_method"] == "slerp"


def test_differences_of_the_configs_are_named() -> None:
    save("a")
    save("b", model_type="qwen2", vocab_size=5)
    text = init_recipe(["a", "b"]).result
    assert "# The configs differ in model_type: a llama, b qwen2." in text
    assert "# The configs differ in vocab_size: a 4, b 5." in text and "# rows: crop" in text


def test_paths_are_relative_to_the_recipe_and_quoted_where_yaml_needs_it(folder: Path) -> None:
    models = [save("a: b#c"), save("true"), save("plain")]
    init_recipe(models, "recipes/new.yaml")
    recipe = Recipe.load(folder / "recipes/new.yaml")
    assert [model.source for model in recipe.parts[0].inputs] == [folder / name for name in models]


def test_the_command_writes_the_file_and_prints_its_path() -> None:
    models = [save("a"), save("b")]
    result = run("init", *models)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "recipe.yaml\n", "")
    text = Path("recipe.yaml").read_text()
    assert run("init", *models, "-o", "-").stdout == text
    assert answer(run("init", *models, "-o", "new.yaml", "--json")) == {"path": "new.yaml", "recipe": text}


def test_a_file_that_exists_is_kept() -> None:
    save("a")
    Path("recipe.yaml").write_text("mine")
    assert "recipe.yaml exists; choose another output" in refusal(run("init", "a"))
    assert Path("recipe.yaml").read_text() == "mine"
    with pytest.raises(PlanError, match="lies in the input a"):
        init_recipe(["a"], "a/recipe.yaml")


def test_a_model_that_is_not_there_is_named() -> None:
    assert "nowhere" in refusal(run("init", "nowhere"))
    assert not Path("recipe.yaml").exists()
    with pytest.raises(PlanError, match="found no models"):
        init_recipe([])


def test_sizes_of_the_wrong_type_in_a_config_are_compared(tmp_path: Path) -> None:
    for name, size in {"a": [1, 2], "b": {"c": 3}}.items():
        save_checkpoint(tmp_path / name, {"w": torch.ones(2)}, {"vocab_size": size})
    assert "rows: crop" in init_recipe([tmp_path / "a", tmp_path / "b"]).result


def test_a_folder_whose_name_begins_like_a_home_folder_is_itself() -> None:
    save("~model")
    assert "model: ./~model" in init_recipe(["~model"]).result


def test_the_model_of_adapters_is_the_base(folder: Path) -> None:
    """Where all are adapters to one model, or the model itself; an adapter of another model tells nothing."""
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
        save_file({"norm": torch.ones(2)}, folder / name / "adapter_model.safetensors")
    save("base")
    save("other")
    for others in (["base+one", "base+0.5*two"], ["base+one", "base+0.5*two", "base"]):
        recipe = proposal(*others)
        assert (recipe["merge_method"], recipe["base_model"]) == ("ties", "base")
        assert [line["model"] for line in recipe["models"]] == others[:2]
        Path("recipe.yaml").unlink()
    assert proposal("base+one", "other+two")["merge_method"] == "slerp"
