"""Stages between runs: refusals before any work, results that are made again, and names that no folder can have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from helpers_commands import run
from models import files_of, save_checkpoint

from mergekit_lfm import merge, plan_merge
from mergekit_lfm.errors import PlanError
from mergekit_lfm.recipe.source import RecipeText

STAGES = """
name: {name}
merge_method: linear
models: [{{model: a}}, {{model: b}}]
parameters: {{weight: {weight}}}
---
merge_method: linear
models: [{{model: a}}, {{model: {name}}}]
parameters: {{weight: 1, normalize: true}}
{more}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("ab"):
        save_checkpoint(tmp_path / name, {"w": torch.full((4,), i + 1.0)}, {})
    return tmp_path


def write(folder: Path, name: str = "x", weight: str = "[1, 1]", more: str = "") -> Path:
    path = folder / "r.yaml"
    path.write_text(STAGES.format(name=name, weight=weight, more=more))
    return path


@pytest.mark.parametrize(
    "name", ["5", '"a\\0b"', '"a\\nb"', "x" * 201, "é" * 101, "x.partial", "../x", ".x", '""'], ids=range(9)
)
def test_a_name_that_is_no_folder_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(PlanError, match=r"document 1: name: found .*, expected"):
        plan_merge(write(folder, name))


@pytest.mark.parametrize("output", ["5", "[x]", "{a: b}"])
def test_an_output_that_is_no_text_is_refused(folder: Path, output: str) -> None:
    with pytest.raises(PlanError, match="output: "):
        plan_merge(write(folder, more=f"output: {output}"))


def test_a_stage_is_made_again_when_only_bytes_of_its_inputs_changed(folder: Path) -> None:
    recipe = write(folder)
    merge(recipe, "out")
    before, stage = files_of(folder / "out"), files_of(folder / "out.stages/x")
    save_checkpoint(folder / "new", {"w": torch.full((4,), 9.0)}, {})
    (folder / "new/model.safetensors").replace(folder / "b/model.safetensors")
    with pytest.raises(PlanError, match=r"out .*--overwrite"):
        merge(recipe, "out")
    assert files_of(folder / "out") == before and files_of(folder / "out.stages/x") != stage
    assert not merge(recipe, "out", overwrite=True).already_there
    assert merge(recipe, "out").already_there


def test_a_stage_that_lost_its_weights_is_made_again(folder: Path) -> None:
    recipe = write(folder)
    merge(recipe, "out")
    stage = files_of(folder / "out.stages/x")
    (folder / "out.stages/x/model.safetensors").unlink()
    merge(recipe, "out", overwrite=True)
    assert files_of(folder / "out.stages/x") == stage


def test_an_output_of_another_recipe_is_refused_before_a_stage_runs(folder: Path) -> None:
    merge(write(folder), "out")
    before = files_of(folder / "out.stages")
    with pytest.raises(PlanError, match="--overwrite"):
        merge(write(folder, weight="1", more="dtype: bfloat16"), "out")
    assert files_of(folder / "out.stages") == before


def test_a_file_in_place_of_the_folder_of_stages_is_refused(folder: Path) -> None:
    (folder / "out.stages").write_text("mine")
    with pytest.raises(PlanError, match=r"out\.stages is a file, expected a folder for the results of stages"):
        merge(write(folder), "out")


def test_an_output_without_a_name_of_its_own_has_its_stages_beside_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(folder).absolute()
    (folder / "out").mkdir()
    monkeypatch.chdir(folder / "out")
    merge(recipe, ".")
    monkeypatch.chdir(folder)  # the folder that was here is another one now
    assert (folder / "out.stages/x/model.safetensors").is_file() and (folder / "out/model.safetensors").is_file()
    with pytest.raises(PlanError, match="is the root of the file system, expected a folder to create"):
        merge(recipe, "/")


def test_stages_as_data_and_as_text_are_those_of_a_file(folder: Path) -> None:
    path = write(folder)
    merge(path, "out")
    documents = list(yaml.safe_load_all(path.read_text()))
    merge(documents, "data")
    merge(RecipeText(path.read_text(), folder), "text")
    assert run("merge", "-", "stdin", standard_input=path.read_text()).exit_code == 0
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("out", "data", "text", "stdin")]
    assert weights == weights[:1] * 4
    with pytest.raises(PlanError, match="no output: give OUT"):
        merge(documents)
