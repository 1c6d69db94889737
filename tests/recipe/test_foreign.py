"""Methods, documents and programs of other tools are called by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_commands import refusal, run
from helpers_merges import load_all
from safetensors.torch import save_file

from mergekit_lfm import METHODS, PlanError, Recipe, merge, merge_tensors
from mergekit_lfm.api.jobs import JOBS
from mergekit_lfm.commands.app import main
from mergekit_lfm.commands.mergekit import PROGRAMS
from mergekit_lfm.recipe.foreign import METHODS_ELSEWHERE

# The registry of mergekit 0.1.5.
MERGEKIT = """
linear slerp nuslerp multislerp karcher passthrough model_stock nearswap arcee_fusion sce ram ramplus_tl task_arithmetic
ties dare_linear dare_ties breadcrumbs breadcrumbs_ties della della_linear
"""
MODELS = [{"model": "a"}, {"model": "b"}]


def test_every_method_of_mergekit_is_here() -> None:
    assert set(MERGEKIT.split()) <= METHODS.keys()
    assert {nearest for _, nearest in METHODS_ELSEWHERE.values()} <= METHODS.keys()


ABSENT = [(name, tool) for name, (tool, _) in METHODS_ELSEWHERE.items() if name not in METHODS]


@pytest.mark.parametrize(("name", "tool"), ABSENT)
def test_a_method_of_another_tool_is_named_as_such(name: str, tool: str) -> None:
    expected = f"{name} is a method of {tool} that is not here; nearest: {METHODS_ELSEWHERE[name][1]}"
    with pytest.raises(PlanError, match=f"recipe: merge_method: {expected}$") as refused:
        Recipe.parse({"merge_method": name, "models": MODELS})
    assert refused.value.parts["cure"].startswith("nearest: ")
    with pytest.raises(PlanError, match=f"^{expected}$"):
        merge_tensors(name, [torch.ones(2)])
    assert expected in refusal(run("methods", name))


def test_a_slip_of_the_pen_is_still_one() -> None:
    with pytest.raises(PlanError, match=r"unknown method 'liner', did you mean linear\?"):
        Recipe.parse({"merge_method": "liner", "models": MODELS})


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"base_model": "a", "gate_mode": "hidden", "experts": [{"source_model": "b"}]}, "mergekit-moe"),
        ({"genome": {"models": ["a", "b"], "merge_method": "ties"}, "tasks": [{"name": "x"}]}, "mergekit-evolve"),
        ({"model": "a", "donor": "b"}, "mergekit-tokensurgeon"),
        ({"layer_slices": [{"model": "a", "start": 0, "end": 2}]}, "bakllama"),
        ({"job": "tune", "model": "a"}, "job tune: a merge has no `job`"),
    ],
)
def test_a_document_for_something_else_is_one_message(document: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words) as refused:
        Recipe.parse(document)
    assert "\n" not in str(refused.value) and refused.value.parts["cure"]
    assert str(refused.value).startswith("recipe: ")


def test_a_stage_for_something_else_is_named(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("name: x\njob: distil\n---\nmerge_method: linear\nmodels: [{model: x}]\n")
    assert f"stage x: job distil: expected {' or '.join(JOBS)}, or no `job`" in refusal(run("plan", str(file)))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_mergekit_names_its_counterpart(name: str) -> None:
    words = (name, name.removeprefix("mergekit-"))
    for word in (word for word in words if word not in main.commands):  # `extract-lora` is one here, too
        result = run(word, "x", "y")
        assert result.exit_code == 2 and f"{name} is a program of mergekit; here: {PROGRAMS[name]}" in result.stderr


def test_the_config_of_mergekit_pytorch_is_a_recipe(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2), "only": torch.ones(1)}, tmp_path / "a.safetensors")
    torch.save({"w": torch.full((2,), 3.0)}, tmp_path / "b.pt")
    lines = [{"model": "a.safetensors", "parameters": {"weight": 1}}, {"model": "b.pt", "parameters": {"weight": 1}}]
    recipe = Recipe.parse({"merge_method": "linear", "models": lines, "tensors": "common"}, tmp_path)
    merged = load_all(Path(merge(recipe, tmp_path / "out")))
    assert merged["w"].tolist() == [2, 2] and merged["only"].tolist() == [1]
