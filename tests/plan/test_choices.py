"""A recipe's choices where models differ: what all share, heads of one model, and rows of vocabularies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_merges import Tensors, load_all
from models import save_checkpoint

from mergekit_lfm import merge
from mergekit_lfm.errors import PlanError
from mergekit_lfm.output.lock import verify
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe

TRUNK, HEAD, BIAS = "roberta.encoder.layer.0.output.dense.weight", "classifier.out_proj.weight", "classifier.dense.bias"
ROBERTA = {"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"], "dtype": "float32"}


def classifier(folder: Path, seed: int, classes: int) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    tensors = {TRUNK: torch.randn(8, 8, generator=draw), HEAD: torch.randn(classes, 8, generator=draw)}
    tensors[BIAS] = torch.randn(8, generator=draw)
    labels = {str(i): f"{folder.name}{i}" for i in range(classes)}
    save_checkpoint(folder, tensors, {**ROBERTA, "id2label": labels})
    return tensors


def recipe_of(tmp_path: Path, *names: str, **more: Any) -> dict[str, Any]:
    models = [{"model": str(tmp_path / name)} for name in names]
    return {"merge_method": "linear", "models": models, "parameters": {"weight": 1.0}, **more}


def mean(*tensors: torch.Tensor) -> torch.Tensor:
    return (sum(tensor.double() for tensor in tensors) / len(tensors)).float()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        ({"tensors": "common"}, "a"),
        ({"keep": {"classifier.out_proj": "base"}}, "a"),
        ({"keep": {"classifier.out_proj": "b"}}, "b"),
        ({"keep": {"classifier.out_proj": "drop"}}, None),
    ],
)
def test_heads_of_other_classes(tmp_path: Path, choice: dict[str, Any], kept: str | None) -> None:
    models = {"a": classifier(tmp_path / "a", 1, 2), "b": classifier(tmp_path / "b", 2, 3)}
    keep = {part: str(tmp_path / name) if name == "b" else name for part, name in choice.get("keep", {}).items()}
    choice = {"keep": keep} if keep else choice
    out = Path(merge(recipe_of(tmp_path, "a", "b", **choice), tmp_path / "out"))
    merged = load_all(out)
    assert torch.equal(merged[TRUNK], mean(models["a"][TRUNK], models["b"][TRUNK]))
    assert torch.equal(merged[BIAS], mean(models["a"][BIAS], models["b"][BIAS]))
    assert (HEAD in merged) == (kept is not None)
    if kept is not None:
        assert torch.equal(merged[HEAD], models[kept][HEAD])
        labels = json.loads((out / "config.json").read_text())["id2label"]
        assert list(labels.values()) == [f"{kept}{i}" for i in range(len(merged[HEAD]))]
    dropped = {
        (model, tensor) for model, tensor, _ in make_plan(Recipe.parse(recipe_of(tmp_path, "a", "b", **choice))).dropped
    }
    assert dropped == {(str(tmp_path / name), HEAD) for name in "ab" if name != kept}
    assert verify(out) == []


def test_a_head_that_only_another_model_has(tmp_path: Path) -> None:
    save_checkpoint(
        tmp_path / "a", {TRUNK: torch.ones(8, 8)}, {"model_type": "roberta", "architectures": ["RobertaModel"]}
    )
    theirs = classifier(tmp_path / "b", 2, 3)
    out = Path(merge(recipe_of(tmp_path, "a", "b", keep={"classifier": str(tmp_path / "b")}), tmp_path / "out"))
    merged = load_all(out)
    assert torch.equal(merged[HEAD], theirs[HEAD]) and torch.equal(merged[BIAS], theirs[BIAS])
    assert json.loads((out / "config.json").read_text())["architectures"] == ROBERTA["architectures"]


def test_a_refusal_ends_with_the_line_to_add(tmp_path: Path) -> None:
    classifier(tmp_path / "a", 1, 2)
    classifier(tmp_path / "b", 2, 3)
    with pytest.raises(PlanError) as refusal:
        make_plan(Recipe.parse(recipe_of(tmp_path, "a", "b")))
    text = str(refusal.value)
    assert f"{HEAD} is [3, 8] in" in text and "[2, 8] in" in text
    assert "`tensors: common`" in text and "`keep: {classifier.out_proj: base}`" in text


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"nothing": "base"}, "'nothing' is part of no tensor's name"),
        ({"classifier": "c"}, "found 'c', expected base, drop or one of the models"),
    ],
)
def test_choices_that_do_not_fit_are_refused(tmp_path: Path, keep: dict[str, str], message: str) -> None:
    classifier(tmp_path / "a", 1, 2)
    classifier(tmp_path / "b", 2, 2)
    with pytest.raises(PlanError, match=message):
        make_plan(Recipe.parse(recipe_of(tmp_path, "a", "b", keep=keep)))


EMBEDDING, LM_HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.q.weight"


def language_model(folder: Path, seed: int, rows: int, dtype: torch.dtype = torch.float32) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    tensors = {EMBEDDING: torch.randn(rows, 6, generator=draw), Q: torch.randn(6, 6, generator=draw)}
    tensors[LM_HEAD] = torch.randn(rows, 6, generator=draw)
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    config = {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": rows}
    save_checkpoint(folder, tensors, config)
    return tensors


@pytest.mark.parametrize("order", [("a", "b", "c"), ("b", "a", "c"), ("c", "b", "a")])
@pytest.mark.parametrize("rows", ["crop", "keep"])
def test_vocabularies_of_other_lengths(tmp_path: Path, rows: str, order: tuple[str, ...]) -> None:
    models = {
        name: language_model(tmp_path / name, i, n) for i, (name, n) in enumerate((("a", 64), ("b", 61), ("c", 63)))
    }
    recipe = recipe_of(tmp_path, *order, rows=rows)
    out = Path(merge(recipe, tmp_path / "out"))
    merged, first = load_all(out), models[order[0]]
    length = 61 if rows == "crop" else len(first[EMBEDDING])
    for name in (EMBEDDING, LM_HEAD):
        assert merged[name].shape == (length, 6)
        assert torch.allclose(merged[name][:61], mean(*(models[n][name][:61] for n in order)), atol=2e-7)
        assert torch.equal(merged[name][61:], first[name][61:length])
    assert torch.allclose(merged[Q], mean(*(models[name][Q] for name in order)), atol=2e-7)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == length
    lost = {model: text for model, text, _ in make_plan(Recipe.parse(recipe)).dropped if text.startswith(EMBEDDING)}
    assert set(lost) == {str(tmp_path / n) for n in order if len(models[n][EMBEDDING]) > length}
    assert verify(out) == []


@pytest.mark.parametrize("method", ["slerp", "ties", "nuslerp"])
def test_kept_rows_are_the_base_s_bytes_whatever_the_method(tmp_path: Path, method: str) -> None:
    base = language_model(tmp_path / "a", 1, 300, torch.bfloat16)
    language_model(tmp_path / "b", 2, 290)
    values = {"slerp": {"t": 0.3}, "ties": {"weight": 1.0, "density": 0.5}, "nuslerp": {"weight": 0.5}}[method]
    recipe = {**recipe_of(tmp_path, "a", "b", rows="keep"), "merge_method": method, "parameters": values}
    recipe |= {"dtype": "bfloat16"} | ({} if method == "nuslerp" else {"base_model": str(tmp_path / "a")})
    if method == "ties":
        recipe["models"] = recipe["models"][1:]
    merged = load_all(Path(merge(recipe, tmp_path / "out", threads=2)))
    assert torch.equal(merged[EMBEDDING][290:], base[EMBEDDING][290:])
    assert not torch.equal(merged[EMBEDDING][:290], base[EMBEDDING][:290])


def test_the_way_out_of_other_lengths_is_named(tmp_path: Path) -> None:
    language_model(tmp_path / "a", 1, 64)
    language_model(tmp_path / "b", 2, 61)
    with pytest.raises(PlanError, match=r"padded or resized: add `rows: crop`.*`rows: keep`"):
        make_plan(Recipe.parse(recipe_of(tmp_path, "a", "b")))
