"""Slices and modules of models that differ: what the config of the template does not describe is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_checkpoint

from mergekit_lfm import merge
from mergekit_lfm.errors import PlanError


def save_model(folder: Path, layers: int = 2, width: int = 2, rows: int = 4, *, tied: bool = False) -> None:
    tensors = {"model.embed_tokens.weight": torch.randn(rows, width)}
    tensors |= {f"model.layers.{i}.mlp.weight": torch.randn(3, width) for i in range(layers)}
    tensors |= {"model.norm.weight": torch.randn(width)} | (
        {} if tied else {"lm_head.weight": torch.randn(rows, width)}
    )
    stated = {"num_hidden_layers": layers, "hidden_size": width, "vocab_size": rows, "tie_word_embeddings": tied}
    save_checkpoint(folder, tensors, {"model_type": "llama", **stated})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    save_model(path / "a")
    save_model(path / "b")
    save_model(path / "deep", 4)
    save_model(path / "wide", width=6)
    save_model(path / "rows", rows=5)
    save_model(path / "tied", tied=True)
    return path


def stack(folder: Path, *names: str, layers: int = 2) -> dict[str, Any]:
    return {"slices": [{"sources": [{"model": str(folder / name), "layer_range": [0, layers]}]} for name in names]}


def parts(folder: Path, **modules: str) -> dict[str, Any]:
    names = {name.replace("_", ".", 1) if name != "lm_head" else name: model for name, model in modules.items()}
    return {"modules": {name: {"models": [{"model": str(folder / model)}]} for name, model in names.items()}}


def make(folder: Path, out: Path, recipe: dict[str, Any], base: str | None) -> None:
    merge({**recipe, **({} if base is None else {"base_model": str(folder / base)})}, out)


@pytest.mark.parametrize(
    ("models", "base", "message"),
    [
        (("a", "wide"), None, r"layers\.2\.mlp\.weight would be \[3, 6\], and \[3, 2\] in"),
        (("wide",), "a", r"embed_tokens\.weight would be \[4, 6\], and \[4, 2\] in"),
        (("a", "rows"), None, r"lm_head\.weight would be \[5, 2\], and \[4, 2\] in"),
    ],
)
def test_stacks_that_no_config_describes(
    folder: Path, tmp_path: Path, models: tuple[str, ...], base: str | None, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        make(folder, tmp_path / "out", stack(folder, *models), base)


@pytest.mark.parametrize(
    ("modules", "base", "message"),
    [
        ({"model_layers": "deep"}, "a", r"would have 4 layers model\.layers\.\*, and .*a, .* 2: take the layers with"),
        ({"model_layers": "a"}, "deep", r"would have 2 layers model\.layers\.\*, and .*deep, .* 4"),
        ({"model_layers": "wide"}, "a", r"layers\.0\.mlp\.weight would be \[3, 6\]"),
        ({"model": "tied", "lm_head": "tied"}, "a", r"would lack lm_head\.weight"),
    ],
)
def test_modules_that_no_config_describes(
    folder: Path, tmp_path: Path, modules: dict[str, str], base: str | None, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        make(folder, tmp_path / "out", parts(folder, **modules), base)


@pytest.mark.parametrize(
    ("models", "base", "head"),
    [
        (("tied", "tied"), None, False),
        (("tied", "a"), None, True),
        (("a", "tied"), None, True),
        (("a", "tied"), "tied", False),
        (("tied", "a"), "a", True),
        (("a", "deep"), None, True),
    ],
)
def test_stacks_that_a_config_describes(
    folder: Path, tmp_path: Path, models: tuple[str, ...], base: str | None, head: bool
) -> None:
    make(folder, tmp_path / "out", stack(folder, *models), base)
    config = json.loads((tmp_path / "out/config.json").read_text())
    lock = json.loads((tmp_path / "out/merge.lock.json").read_text())
    assert (config["num_hidden_layers"], config["tie_word_embeddings"]) == (4, not head)
    assert ("lm_head.weight" in lock["tensors"]) == head


def test_one_slice_over_all_layers_of_another_model_than_the_base_has_their_number(
    folder: Path, tmp_path: Path
) -> None:
    make(folder, tmp_path / "out", stack(folder, "deep", layers=4), "a")
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 4
