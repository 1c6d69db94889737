"""Forms of public recipes that mean one thing exactly, and those close to them that do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_merges import load_all
from models import save_checkpoint

from mergekit_lfm import merge
from mergekit_lfm.api.outcome import Finding
from mergekit_lfm.errors import PlanError
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    """Three models of two layers, with one tokenizer."""
    for seed, name in enumerate("oab"):
        draw = torch.Generator().manual_seed(seed)
        tensors = {f"model.layers.{i}.w": torch.randn(4, 4, generator=draw) for i in range(2)}
        save_checkpoint(tmp_path / name, tensors, {"model_type": "llama"})
        vocabulary = {"x": 0, "y": 1}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "no": seed}))
    return [str(tmp_path / name) for name in "oab"]


def slices(models: list[str], *ranges: tuple[int, int], **more: Any) -> dict[str, Any]:
    """A slerp in the form of public cards."""
    sources = [{"model": model, "layer_range": list(layers)} for model, layers in zip(models[1:], ranges, strict=True)]
    return {
        "slices": [{"sources": sources}],
        "merge_method": "slerp",
        "base_model": models[1],
        "parameters": {"t": [0.2, 0.8]},
        **more,
    }


def test_one_slice_over_all_layers_is_models(models: list[str], tmp_path: Path) -> None:
    one = load_all(Path(merge(slices(models, (0, 2), (0, 2)), tmp_path / "one")))
    plain = {**slices(models, (0, 2), (0, 2)), "models": [{"model": model} for model in models[1:]]}
    del plain["slices"]
    other = load_all(Path(merge(plain, tmp_path / "other")))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "task_arithmetic"])
def test_parameters_of_a_base_that_is_subtracted_have_no_effect(models: list[str], tmp_path: Path, method: str) -> None:
    lines = [{"model": model, "parameters": {"weight": 0.3, "density": 0.5}} for model in models]
    if method == "task_arithmetic":
        lines = [{"model": model, "parameters": {"weight": 0.3}} for model in models]
    recipe = {"merge_method": method, "base_model": models[0], "models": lines}
    with pytest.warns(Finding, match="models\\[0\\].parameters: `weight`.* has no effect here"):
        one = load_all(Path(merge(recipe, tmp_path / "one")))
    other = load_all(Path(merge({**recipe, "models": lines[1:]}, tmp_path / "other")))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("key", "value"), [("normalize", False), ("int8_mask", True), ("random_seed", 7), ("name", "x"), ("embed_slerp", 1)]
)
def test_keys_that_mergekit_does_not_read_have_no_effect(models: list[str], key: str, value: Any) -> None:
    lines = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    recipe = {"merge_method": "linear", "models": lines}
    (notice,) = Recipe.parse({**recipe, key: value}).notices
    assert notice.startswith(f"`{key}` at the top level has no effect here: ")
    assert Recipe.parse({**recipe, key: value}).normalised() == Recipe.parse(recipe).normalised()


@pytest.mark.parametrize("source", ["base", "union"])
def test_a_tokenizer_s_source_is_read_where_all_are_equal(models: list[str], source: str) -> None:
    lines = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    recipe = {"merge_method": "linear", "models": lines, "tokenizer_source": source}
    assert make_plan(Recipe.parse(recipe)).tensors
    (Path(models[2]) / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": 0, "y": 1, "z": 2}}}))
    with pytest.raises(PlanError, match="has no embedding whose name is known"):
        make_plan(Recipe.parse(recipe))
