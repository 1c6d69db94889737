"""Tokenizers and templates that are no such thing: one message, or a merge that leaves the odd entry as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_checkpoint

from mergekit_lfm import merge, plan_merge
from mergekit_lfm.errors import FormatError, PlanError

LETTERS = {letter: i for i, letter in enumerate("abcd")}
OTHERS = {letter: i for i, letter in enumerate("abcz")}


def save_model(folder: Path, vocabulary: Any, added: Any = ()) -> None:
    rows = {name: torch.ones(4, 2) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_checkpoint(folder, rows, {"vocab_size": 4})
    data = {"added_tokens": list(added), "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(data))


def recipe_of(folder: Path, *names: str, **more: Any) -> dict[str, Any]:
    models = [{"model": str(folder / name), "parameters": {"weight": 1}} for name in names]
    return {"merge_method": "linear", "models": models, **more}


@pytest.mark.parametrize("content", [["x"], {"x": 1}, None, 5], ids=str)
def test_a_token_that_is_no_text_is_a_token_of_its_text(tmp_path: Path, content: object) -> None:
    save_model(tmp_path / "a", LETTERS)
    save_model(tmp_path / "b", {**LETTERS, "e": 9}, [{"id": 3, "content": content, "special": True}])
    merge(recipe_of(tmp_path, "a", "b", tokenizer_source="union"), tmp_path / "out")
    added = json.loads((tmp_path / "out/tokenizer.json").read_text())["added_tokens"]
    assert [(entry["content"], entry["special"]) for entry in added] == [(str(content), True)]


@pytest.mark.parametrize("vocabulary", ["abc", None, {}, {"a": -1}, {"a": 4}, {"a": float("nan")}], ids=str)
def test_a_tokenizer_without_tokens_has_no_rows(tmp_path: Path, vocabulary: object) -> None:
    save_model(tmp_path / "a", vocabulary)
    save_model(tmp_path / "b", LETTERS)
    with pytest.raises(PlanError, match=r"has no token with a row in the embedding, .* fetch or write it again"):
        plan_merge(recipe_of(tmp_path, "a", "b", tokenizer_source="base"), tmp_path / "out")


def test_half_characters_stay_as_they_are(tmp_path: Path) -> None:
    save_model(tmp_path / "a", LETTERS)
    save_model(tmp_path / "b", {**LETTERS, "\ud800": 3})
    merge(recipe_of(tmp_path, "a", "b", tokenizer_source="union"), tmp_path / "out")
    added = json.loads((tmp_path / "out/tokenizer.json").read_text())["added_tokens"]
    assert "\ud800" in [entry["content"] for entry in added]


def test_odd_entries_of_a_tokenizers_config_are_left(tmp_path: Path) -> None:
    odd = {"additional_special_tokens": [["x"], {"content": {}}], "eos_token": [1], "chat_template": [1, {"name": 5}]}
    for name, tokens in {"a": LETTERS, "b": OTHERS}.items():
        save_model(tmp_path / name, tokens)
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(odd))
    recipe = recipe_of(tmp_path, "a", "b", tokenizer_source="union", chat_template="chatml")
    merge(recipe, tmp_path / "out")
    made = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert made == {key: odd[key] for key in odd if key != "chat_template"}


@pytest.mark.parametrize("name", ["chat_template.jinja", "vocab.txt"])
def test_text_that_is_not_utf8_is_refused(tmp_path: Path, name: str) -> None:
    for model in "ab":
        save_model(tmp_path / model, LETTERS)
        (tmp_path / model / "tokenizer.json").unlink()
        (tmp_path / model / name).write_bytes(model.encode() + b"\xff")
    with pytest.raises(FormatError, match=f"{name}: not UTF-8 text .*; fetch or write it again"):
        plan_merge(recipe_of(tmp_path, "a", "b", chat_template="auto"), tmp_path / "out")


@pytest.mark.parametrize(
    "tokenizer", [{"tokens": {"a": {"source": {"kind": []}}}}, {"source": []}, {"source": {}}, {"tokens": []}], ids=str
)
def test_values_of_another_type_are_refused(tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    save_model(tmp_path / "a", LETTERS)
    with pytest.raises(PlanError, match=r"tokenizer\.(source|tokens).*(found|kind)"):
        plan_merge(recipe_of(tmp_path, "a", tokenizer=tokenizer), tmp_path / "out")
