"""Models of equal shapes whose numbers mean other things are refused, with both values and the line that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_checkpoint

from mergekit_lfm import merge
from mergekit_lfm.api.outcome import Finding
from mergekit_lfm.errors import PlanError
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe

LLAMA = {
    "model_type": "llama",
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "num_attention_heads": 4,
    "dtype": "float32",
}


def two_models(tmp_path: Path, one: dict[str, Any], two: dict[str, Any], **more: Any) -> dict[str, Any]:
    for name, config in (("a", one), ("b", two)):
        save_checkpoint(tmp_path / name, {"w": torch.ones(4, 4)}, config)
    models = [{"model": str(tmp_path / name)} for name in ("a", "b")]
    return {"merge_method": "linear", "models": models, "parameters": {"weight": 1.0}, **more}


@pytest.mark.parametrize(
    ("fact", "changes"),
    [
        ("rope_theta", {"rope_theta": 1e6}),
        ("rope_theta", {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("rope_scaling", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("rms_norm_eps", {"rms_norm_eps": 1e-6}),
        ("num_attention_heads", {"num_attention_heads": 2}),
        ("model_type", {"model_type": "mistral"}),
    ],
)
def test_a_config_that_changes_the_meaning(tmp_path: Path, fact: str, changes: dict[str, Any]) -> None:
    recipe = two_models(tmp_path, LLAMA, {**LLAMA, **changes})
    with pytest.raises(PlanError, match=rf"{fact} is .* in .*b, .* in .*a\n.*add `allow: \[{fact}\]`"):
        make_plan(Recipe.parse(recipe))
    with pytest.warns(Finding, match=f"merged although {fact} is"):
        out = Path(merge({**recipe, "allow": [fact]}, tmp_path / "out"))
    lock = json.loads((out / "merge.lock.json").read_text())
    assert lock["recipe"]["allow"] == [fact] and fact in lock["allowed"][0]


@pytest.mark.parametrize(
    "two",
    [
        {"model_type": "llama"},
        {**LLAMA, "rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {**LLAMA, "rope_scaling": None},
        {**LLAMA, "vocab_size": 5, "bos_token_id": 7, "max_position_embeddings": 4096},
        {},
    ],
)
def test_configs_that_mean_the_same(tmp_path: Path, two: dict[str, Any]) -> None:
    """Of other versions of transformers, with entries unstated, or with others that change no number's meaning."""
    assert not make_plan(Recipe.parse(two_models(tmp_path, LLAMA, two))).allowed


def test_a_part_of_a_config_is_named(tmp_path: Path) -> None:
    parts = [{"model_type": "llava", "text_config": {"rms_norm_eps": eps}} for eps in (1e-5, 1e-6)]
    with pytest.raises(PlanError, match=r"text_config.rms_norm_eps is 1e-06 in"):
        make_plan(Recipe.parse(two_models(tmp_path, *parts)))


def tokenizer(tokens: list[str], added: dict[int, str], kind: str = "WordLevel") -> str:
    vocabulary: Any = {token: i for i, token in enumerate(tokens)}
    if kind == "Unigram":
        vocabulary = [[token, -1.0] for token in tokens]
    entries = [{"id": i, "content": token} for i, token in added.items()]
    return json.dumps({"model": {"type": kind, "vocab": vocabulary}, "added_tokens": entries})


@pytest.mark.parametrize("kind", ["WordLevel", "Unigram"])
def test_other_tokens_for_one_id(tmp_path: Path, kind: str) -> None:
    recipe = two_models(tmp_path, LLAMA, LLAMA)
    (tmp_path / "a" / "tokenizer.json").write_text(tokenizer(["x", "y", "z"], {}, kind))
    (tmp_path / "b" / "tokenizer.json").write_text(tokenizer(["x", "z", "y"], {}, kind))
    with pytest.raises(PlanError, match=r"tokens for the ids 1: 'z' and 'y', 2: 'y' and 'z'\n.*allow: \[tokens\]"):
        make_plan(Recipe.parse(recipe))
    (tmp_path / "b" / "tokenizer.json").write_text(tokenizer(["x", "y", "z"], {3: "<pad>"}, kind))
    assert not make_plan(Recipe.parse(recipe)).allowed  # another token changes no meaning


@pytest.mark.parametrize("file", ["vocab.txt", "vocab.json"])
def test_other_tokens_in_other_files(tmp_path: Path, file: str) -> None:
    recipe = two_models(tmp_path, LLAMA, LLAMA)
    for name, tokens in (("a", ["x", "y"]), ("b", ["y", "x"])):
        text = "\n".join(tokens) if file == "vocab.txt" else json.dumps({t: i for i, t in enumerate(tokens)})
        (tmp_path / name / file).write_text(text)
    with pytest.raises(PlanError, match="other tokens for the ids 0: 'y' and 'x'"):
        make_plan(Recipe.parse(recipe))


@pytest.mark.parametrize(
    "names",
    [
        ("lora_A.weight", "lora_B.weight"),
        ("q.lora_down.weight", "q.lora_up.weight"),
        ("q.hada_w1_a", "q.hada_w1_b"),
    ],
)
def test_factors_of_adapters_are_not_averaged(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, {**{factor: torch.ones(2, 2) for factor in names}, "w": torch.ones(2)}, {})
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / name)} for name in ("a", "b")],
        "parameters": {"weight": 1.0},
    }
    with pytest.raises(
        PlanError, match=r"factors of an adapter, such as .*Name each adapter with its model, MODEL\+ADAPTER"
    ):
        make_plan(Recipe.parse(recipe))
    assert len(make_plan(Recipe.parse({**recipe, "allow": ["factors"]})).allowed) == 2


def test_a_model_saved_without_its_weights(tmp_path: Path) -> None:
    recipe = two_models(tmp_path, LLAMA, LLAMA)
    for name in ("c", "d"):
        save_checkpoint(tmp_path / name, {"l.weight": torch.zeros(0), "l.bias": torch.zeros(0)}, LLAMA)
    recipe["models"] = [{"model": str(tmp_path / name)} for name in ("c", "d")]
    with pytest.raises(PlanError, match=r"has empty tensors, of shape \[0\]: l.bias, l.weight"):
        make_plan(Recipe.parse(recipe))


def test_a_fact_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="allow: unknown fact 'rope_tetha', did you mean rope_theta"):
        Recipe.parse(two_models(tmp_path, LLAMA, LLAMA, allow=["rope_tetha"]))
