"""Stacks of models whose first or last layer has a tensor that no other has, or lacks one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers_merges import load_all, load_complete

from mergekit_lfm import merge
from mergekit_lfm.errors import PlanError
from mergekit_lfm.plan.ends import End, find_ends
from mergekit_lfm.plan.layers import find_places
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe

SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2, "pad_token_id": 0}
MODERN = SIZES | {"num_hidden_layers": 7, "cls_token_id": 1, "sep_token_id": 2}
BIAS = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"


def save(kind: str, config: dict[str, Any], folder: Path) -> Path:
    torch.manual_seed(0)
    model = getattr(transformers, kind)
    model(model.config_class(**config)).save_pretrained(folder)
    return folder


def slices_of(model: Path, *ranges: tuple[int, int]) -> list[dict[str, Any]]:
    return [{"sources": [{"model": str(model), "layer_range": list(span)}]} for span in ranges]


# The class, its config, and the tensor of an end: its source, and its name in a stack of layers 1 and 2, then 0 and 1.
OWN = {
    "the first of RWKV": ("RwkvForCausalLM", SIZES, "rwkv.blocks.{}.pre_ln.weight", 0, 0),
    "the last of GPT-NeoX Japanese": (
        "GPTNeoXJapaneseForCausalLM",
        SIZES,
        "gpt_neox_japanese.layers.{}.attention.dense_bias",
        2,
        3,
    ),
    "the first of T5": ("T5EncoderModel", T5, BIAS, 0, 0),
}


@pytest.mark.parametrize("case", OWN)
def test_a_tensor_of_one_end_stays_there(case: str, tmp_path: Path) -> None:
    kind, config, name, source, target = OWN[case]
    model = save(kind, config, tmp_path / "model")
    recipe: dict[str, Any] = {"slices": slices_of(model, (1, 3), (0, 2))}
    out = Path(merge({"merge_method": "passthrough", **recipe}, tmp_path / "out"))
    tensors, stacked = load_all(model), load_all(out)
    assert [i for i in range(4) if name.format(i) in stacked] == [target]
    assert torch.equal(stacked[name.format(target)], tensors[name.format(source)])
    load_complete(kind, out)


def test_the_first_layer_of_modernbert_is_the_first_of_a_stack(tmp_path: Path) -> None:
    model = save("ModernBertForMaskedLM", MODERN, tmp_path / "model")
    recipe: dict[str, Any] = {"merge_method": "passthrough", "slices": slices_of(model, (0, 5), (2, 7))}
    load_complete("ModernBertForMaskedLM", Path(merge(recipe, tmp_path / "out")))


@pytest.mark.parametrize("ranges", [[(0, 4), (0, 7)], [(1, 7)], [(3, 7), (0, 3)]])
def test_a_layer_that_lacks_a_tensor_is_not_moved(ranges: list[tuple[int, int]], tmp_path: Path) -> None:
    model = save("ModernBertForMaskedLM", MODERN, tmp_path / "model")
    with pytest.raises(
        PlanError, match=r"layer 0 of .*, the first, has no attn_norm\.weight, .*expected it as the first"
    ):
        make_plan(Recipe.parse({"merge_method": "passthrough", "slices": slices_of(model, *ranges)}))


@pytest.mark.parametrize(
    ("config", "first", "last"),
    [
        ({"num_hidden_layers": 4}, End(0, frozenset({".a"}), frozenset({".b"})), End(3, frozenset({".c"}))),
        ({}, End(0), End(3)),  # the config says nothing
        ({"num_hidden_layers": 4, "layer_types": ["x", "y", "y", "y"]}, End(0), End(3, frozenset({".c"}))),
    ],
)
def test_layers_of_one_kind_are_compared(config: dict[str, Any], first: End, last: End) -> None:
    names = ["layers.0.a", *(f"layers.{i}.{x}" for i in range(4) for x in "wb"), "layers.3.c"]
    places = find_places(name for name in names if name != "layers.0.b")
    assert find_ends(config, places, "layers.", 4) == (first, last)
