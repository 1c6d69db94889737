"""Merges of rewritten models: `align` in a recipe gives what merging the rewritten checkpoint gives, to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergekit_lfm import merge
from mergekit_lfm.align.elements import random_transform
from mergekit_lfm.arch import find_symmetries
from mergekit_lfm.checkpoint import open_checkpoint
from mergekit_lfm.errors import PlanError
from mergekit_lfm.plan import make_plan
from mergekit_lfm.recipe import Recipe
from mergekit_lfm.rewriting import rewrite
from tests.fixtures_llama import base_tensors, cast, fine_tuned, save
from tests.helpers_commands import refusal, run

Tensors = dict[str, torch.Tensor]
ONE = {"parameters": {"weight": 1}}


def planted(folder: Path, tensors: Tensors, seed: int, kinds: tuple[Any, ...]) -> Tensors:
    """The rewritten tensors; the transform goes to folder/t.safetensors."""
    transform = random_transform(tensors, find_symmetries(open_checkpoint(folder)), seed=seed, kinds=kinds)
    transform.save(folder.parent / "t.safetensors")
    return rewrite(tensors, transform)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """a and b, and b rewritten by every kind of element: in the folder `saved`, and as t.safetensors."""
    monkeypatch.chdir(tmp_path)
    b = cast(base_tensors(2), request.param)
    save(tmp_path / "a", cast(base_tensors(1), request.param))
    save(tmp_path / "b", b)
    save(tmp_path / "saved", planted(tmp_path / "b", b, 3, ("order", "scale", "rotation", "inside")))
    return tmp_path


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "method",
    [
        {"merge_method": "linear", "parameters": {"weight": 1}},
        {"merge_method": "slerp", "base_model": "a", "parameters": {"t": 0.3}},
        {"merge_method": "ties", "base_model": "a", "parameters": {"weight": 1, "density": 0.4}},
    ],
    ids=lambda method: method["merge_method"],
)
@pytest.mark.usefixtures("models")
def test_a_transform_file_gives_the_merge_of_the_rewritten_model(method: dict[str, Any]):
    first = [] if "base_model" in method else [{"model": "a"}]
    whole = merge({**method, "models": [*first, {"model": "saved"}]}, "whole")
    for number, options in enumerate(({}, {"threads": 1, "memory": "40MB"}, {"threads": 3})):
        recipe = {**method, "models": [*first, {"model": "b", "align": "t.safetensors"}]}
        streamed = merge(recipe, f"streamed{number}", **options)
        assert weights(streamed) == weights(whole)
    assert run("verify", str(streamed)).exit_code == 0


def test_passthrough_writes_the_rewritten_model(models: Path):
    out = merge({"merge_method": "passthrough", "models": [{"model": "b", "align": "t.safetensors"}]}, "out")
    expected, found = load_file(models / "saved" / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    lock = json.loads((out / "merge.lock.json").read_text())
    assert lock["recipe"]["models"] == [{"model": "b", "parameters": {}, "align": "t.safetensors"}]
    assert len(lock["inputs"][0]["files"][0]["view"]["transform"]) == 32


def test_the_files_place_is_not_told(models: Path):
    recipe = {"merge_method": "passthrough", "models": [{"model": "b", "align": str(models / "t.safetensors")}]}
    out = merge(recipe, "out")
    for file in ("merge.lock.json", "README.md"):
        assert str(models) not in (out / file).read_text()


def test_another_transform_is_another_plan(models: Path):
    recipe = {"merge_method": "passthrough", "models": [{"model": "b", "align": "t.safetensors"}]}
    before = make_plan(Recipe.parse(recipe)).digest
    b = load_file(models / "b" / "model.safetensors")
    planted(models / "b", b, 4, ("order",))
    assert make_plan(Recipe.parse(recipe)).digest != before


def test_a_transform_of_another_model_is_refused(models: Path):
    save(models / "c", cast(fine_tuned(base_tensors(2), 1), torch.float32))
    transform = random_transform({}, find_symmetries(open_checkpoint(models / "b")), seed=1, kinds=("order",))
    facts = transform.facts
    named = type(facts)(facts.method, models=(open_checkpoint(models / "b").content,))
    type(transform)(transform.symmetries, transform.elements, named).save(models / "of_b.safetensors")
    merge({"merge_method": "passthrough", "models": [{"model": "b", "align": "of_b.safetensors"}]}, "fine")
    with pytest.raises(PlanError, match=r"of_b.safetensors rewrites another model: it is of content"):
        merge({"merge_method": "passthrough", "models": [{"model": "c", "align": "of_b.safetensors"}]}, "refused")
    assert not (models / "refused").exists()


def test_a_model_that_the_table_does_not_fit_is_refused(models: Path):
    save(models / "deeper", base_tensors(2, layers=3))
    (models / "recipe.yaml").write_text(
        "merge_method: passthrough\nmodels: [{model: deeper, align: t.safetensors}]\n", encoding="utf-8"
    )
    message = refusal(run("merge", "recipe.yaml", "out"))
    assert "the `align` of deeper: deeper does not fit the symmetry table" in message
    assert "model.layers.2.input_layernorm.weight [64] float32 is not in the table" in message
    assert not (models / "out").exists()


@pytest.mark.usefixtures("models")
def test_memory_of_rewriting_is_in_the_plan():
    plain = make_plan(Recipe.parse({"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], **ONE}))
    entry = {"model": "b", "align": "t.safetensors"}
    aligned = make_plan(Recipe.parse({"merge_method": "linear", "models": [{"model": "a"}, entry], **ONE}))
    jobs = zip(plain.tensors, aligned.tensors, strict=True)
    more = {job.name: aligned.scratch(job) - plain.scratch(before) for before, job in jobs}
    assert more["model.layers.0.mlp.down_proj.weight"] >= 64 * 96 * 8
    assert all(nbytes >= 0 for nbytes in more.values())
