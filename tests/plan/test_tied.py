"""Tied tensors: matched in either direction, merged once, and written under all names of the template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_merges import Tensors, load_all
from models import save_checkpoint

from mergekit_lfm import merge
from mergekit_lfm.errors import PlanError
from mergekit_lfm.output.lock import read_lock, verify
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
TIED = {"model_type": "llama", "tie_word_embeddings": True, "dtype": "float32"}
BART = ("model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", HEAD)


def tied_model(folder: Path, seed: int, names: tuple[str, ...], config: dict[str, Any], *, shards: int = 1) -> Tensors:
    """A model whose one embedding is stored under these names, beside a norm of its own."""
    draw = torch.Generator().manual_seed(seed)
    table = torch.randn(40, 8, generator=draw)
    tensors = {**{name: table.clone() for name in names}, NORM: torch.randn(8, generator=draw)}
    save_checkpoint(folder, tensors, config, shards=shards)
    return tensors


def recipe_of(tmp_path: Path, *names: str, method: str = "linear", **more: Any) -> dict[str, Any]:
    values = {"weight": 1.0} if method == "linear" else {"weight": 0.5, "density": 0.5}
    models = [{"model": str(tmp_path / name)} for name in names]
    return {"merge_method": method, "models": models, "parameters": values, **more}


@pytest.mark.parametrize(
    ("first", "second"),
    [((EMBEDDING,), (HEAD,)), ((HEAD,), (EMBEDDING,)), ((EMBEDDING, HEAD), (HEAD,)), ((HEAD,), (HEAD, EMBEDDING))],
)
def test_either_name_is_enough(tmp_path: Path, first: tuple[str, ...], second: tuple[str, ...]) -> None:
    a, b = tied_model(tmp_path / "a", 1, first, TIED), tied_model(tmp_path / "b", 2, second, TIED)
    merged = load_all(Path(merge(recipe_of(tmp_path, "a", "b"), tmp_path / "out")))
    assert set(merged) == set(a)
    expected = (a[first[0]].double() + b[second[0]].double()) / 2
    for name in first:
        assert torch.equal(merged[name], expected.float())


@pytest.mark.parametrize("config", [{**TIED, "model_type": "bart"}, {"model_type": "bart"}, {}])
def test_an_encoder_and_a_decoder_share_one_embedding(tmp_path: Path, config: dict[str, Any]) -> None:
    """Also without a config, by equal bytes."""
    a, b = tied_model(tmp_path / "a", 1, BART, config), tied_model(tmp_path / "b", 2, BART[:1], config)
    merged = load_all(Path(merge(recipe_of(tmp_path, "a", "b"), tmp_path / "out")))
    expected = ((a[BART[0]].double() + b[BART[0]].double()) / 2).float()
    assert set(merged) == set(a) and all(torch.equal(merged[name], expected) for name in BART)


@pytest.mark.parametrize("method", ["dare_ties", "ties", "breadcrumbs"])
def test_a_random_or_filtered_merge_keeps_them_equal(tmp_path: Path, method: str) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        tied_model(tmp_path / name, seed, (EMBEDDING, HEAD), TIED, shards=2)
    recipe = recipe_of(tmp_path, "a", "b", method=method, base_model=str(tmp_path / "base"))
    recipe["parameters"]["weight"] = [{"filter": "lm_head", "value": 0.9}, {"value": 0.4}]
    out = Path(merge(recipe, tmp_path / "out"))
    merged = load_all(out)
    assert torch.equal(merged[HEAD], merged[EMBEDDING])
    recipe["parameters"]["weight"] = 0.4  # filters look at the name that loaders read
    again = load_all(Path(merge(recipe, tmp_path / "again")))
    assert torch.equal(merged[EMBEDDING], again[EMBEDDING])
    locked = read_lock(out).tensors
    assert locked[HEAD].digests == locked[EMBEDDING].digests and locked[HEAD].file != locked[EMBEDDING].file
    assert verify(out) == []


def test_one_threshold_for_the_whole_model_counts_them_once(tmp_path: Path) -> None:
    """The merge of models with both names has the numbers of the merge with one."""
    for seed, name in enumerate(("base", "a", "b")):
        tied_model(tmp_path / "both" / name, seed, (EMBEDDING, HEAD), TIED)
        tied_model(tmp_path / "one" / name, seed, (EMBEDDING,), TIED)
    merged = []
    for kind in ("both", "one"):
        recipe = recipe_of(tmp_path / kind, "a", "b", method="ties", base_model=str(tmp_path / kind / "base"))
        recipe["parameters"]["scope"] = "global"
        merged.append(load_all(Path(merge(recipe, tmp_path / kind / "out"))))
    assert torch.equal(merged[0][HEAD], merged[1][EMBEDDING]) and torch.equal(merged[0][NORM], merged[1][NORM])


def test_tied_tensors_that_differ_are_refused(tmp_path: Path) -> None:
    tied_model(tmp_path / "a", 1, (EMBEDDING, HEAD), TIED)
    broken = {EMBEDDING: torch.zeros(40, 8), HEAD: torch.ones(40, 8), NORM: torch.ones(8)}
    save_checkpoint(tmp_path / "b", broken, TIED)
    recipe = recipe_of(tmp_path, "a", "b")
    with pytest.raises(PlanError, match=rf"its config ties {EMBEDDING} and {HEAD}, but they differ"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = Path(merge({**recipe, "keep": {HEAD: "drop"}}, tmp_path / "out"))
    assert set(load_all(out)) == {EMBEDDING, NORM}


def test_tensors_of_their_own_are_not_taken_for_one(tmp_path: Path) -> None:
    """Without a config, and bytes that differ."""
    models = [{EMBEDDING: torch.full((4, 2), 1.0 + i), HEAD: torch.full((4, 2), 5.0 + i)} for i in range(2)]
    for name, tensors in zip(("a", "b"), models, strict=True):
        save_checkpoint(tmp_path / name, tensors, {})
    merged = load_all(Path(merge(recipe_of(tmp_path, "a", "b"), tmp_path / "out")))
    assert merged[EMBEDDING][0, 0] == 1.5 and merged[HEAD][0, 0] == 5.5
    assert all(not job.match.tied for job in make_plan(Recipe.parse(recipe_of(tmp_path, "a", "b"))).tensors)
