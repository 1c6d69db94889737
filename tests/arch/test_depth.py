"""Configs of stacked models: classes of transformers read for each layer what they read for the one it comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from mergekit_lfm.arch.depth import kinds_of, stack_config
from mergekit_lfm.arch.layer_facts import facts_of, model_of, part_at, stacks_of
from mergekit_lfm.errors import PlanError

# Attributes that classes of transformers have for each layer, as entries or computed.
REPORTED = (
    *("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "attention_layers", "indexer_types"),
    *("layers_num_experts", "layer_rope_theta", "activation_sparsity_pattern", "intermediate_size", "sliding_windows"),
    *("kv_sharing_modes", "num_attention_heads_per_layer", "num_key_value_heads_per_layer"),
)
TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
ROUTED = {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "n_group": 1, "topk_group": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
MAMBA = {"mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_ssm": 32}
VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4, "num_layers": 4, "num_decoder_layers": 4}
BART = {"vocab_size": 32, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 4}
HEADS = {"decoder_layers": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "forced_eos_token_id": None}

REPEATED = (0, 1, 1, 2, 3)  # [0, 2) and [1, 4)
TURNED = (0, 2, 1, 3, 3, 2)

# Name: the model class, its config, and the layers of the stack.
CASES: dict[str, tuple[str, dict[str, Any], Sequence[int]]] = {
    "llama": ("LlamaForCausalLM", TINY, REPEATED),
    "qwen2": ("Qwen2ForCausalLM", TINY, TURNED),
    "qwen2-windows": ("Qwen2ForCausalLM", TINY | {"use_sliding_window": True, "max_window_layers": 2}, REPEATED),
    "qwen3-windows": ("Qwen3ForCausalLM", TINY | {"use_sliding_window": True, "max_window_layers": 3}, TURNED),
    "qwen3-next": ("Qwen3NextForCausalLM", TINY | EXPERTS | LINEAR | {"mlp_only_layers": [1]}, REPEATED),
    "gemma2": ("Gemma2ForCausalLM", TINY, REPEATED),
    "gemma3": ("Gemma3ForCausalLM", TINY | {"sliding_window_pattern": 3}, TURNED),
    "gemma3n": (
        "Gemma3nForCausalLM",
        TINY
        | {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 32}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": [24, 32, 24, 40]}
        | {"activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0], "laurel_rank": 4},
        (0, 1, 1, 2, 3, 3),
    ),
    "mixtral": ("MixtralForCausalLM", TINY | {"num_local_experts": 2}, REPEATED),
    "qwen3-moe": ("Qwen3MoeForCausalLM", TINY | EXPERTS | {"mlp_only_layers": [0, 3]}, TURNED),
    "qwen3-moe-steps": ("Qwen3MoeForCausalLM", TINY | EXPERTS | {"decoder_sparse_step": 2}, REPEATED),
    "deepseek-v3": ("DeepseekV3ForCausalLM", TINY | ROUTED | LATENT | {"first_k_dense_replace": 2}, REPEATED),
    "glm4-moe": ("Glm4MoeForCausalLM", TINY | ROUTED | {"first_k_dense_replace": 1}, (0, 2, 1, 3, 3)),
    "ernie": (
        "Ernie4_5_MoeForCausalLM",
        TINY | {"moe_num_experts": 2, "moe_k": 1, "moe_intermediate_size": 8, "moe_layer_start_index": 2},
        REPEATED,
    ),
    "lfm2-moe": (
        "Lfm2MoeForCausalLM",
        TINY | EXPERTS | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2},
        REPEATED,
    ),
    "gpt-oss": ("GptOssForCausalLM", TINY | {"num_local_experts": 2, "num_experts_per_tok": 1}, REPEATED),
    "lfm2": ("Lfm2ForCausalLM", TINY | {"full_attn_idxs": [1, 3]}, REPEATED),
    "jamba": (
        "JambaForCausalLM",
        TINY
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0}
        | {"num_experts": 2, "num_experts_per_tok": 1, "use_mamba_kernels": False, "mamba_d_state": 4},
        (0, 1, 0, 1, 2, 3),
    ),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        {"vocab_size": 32, "hidden_size": 16, "num_heads": 4, "num_layers": 4, "bos_token_id": 0, "eos_token_id": 0}
        | {"attention_types": [[["global", "local"], 2]]},
        REPEATED,
    ),
    "llama4": (
        "Llama4ForCausalLM",
        TINY
        | {"intermediate_size_mlp": 24, "num_local_experts": 2, "interleave_moe_layer_step": 2}
        | {"no_rope_layer_interval": 2},
        REPEATED,
    ),
    "smollm3": ("SmolLM3ForCausalLM", TINY | {"no_rope_layer_interval": 2}, REPEATED),
    "cohere2": ("Cohere2ForCausalLM", TINY | {"sliding_window_pattern": 2}, REPEATED),
    "falcon-h1": ("FalconH1ForCausalLM", TINY | MAMBA, REPEATED),
    "nemotron-h": (
        "NemotronHForCausalLM",
        {key: value for key, value in TINY.items() if key != "num_hidden_layers"}
        | {"layer_types": ["linear_attention", "mlp", "full_attention", "mlp"], "mamba_num_heads": 4}
        | {"mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1},
        REPEATED,
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 32, "n_embd": 16, "n_head": 4, "n_layer": 4} | {"bos_token_id": 0, "eos_token_id": 0},
        TURNED,
    ),
    "t5": ("T5ForConditionalGeneration", T5, REPEATED),
    "bart": ("BartForConditionalGeneration", BART | HEADS, REPEATED),
    "bert": ("BertForMaskedLM", {**TINY, "num_key_value_heads": None}, REPEATED),
    "vit": ("ViTForImageClassification", VISION, REPEATED),
    "dinov2": ("Dinov2Model", VISION, REPEATED),
}


def layers_in(config: Any, kind: type[Any], count: int) -> list[set[tuple[str, torch.Size]]]:
    """The names and shapes of each layer's tensors in a model, of every list of modules with this many entries."""
    with torch.device("meta"):
        state = kind(config).state_dict()
    layers: dict[str, dict[int, set[tuple[str, torch.Size]]]] = {}
    for name, tensor in state.items():
        if match := re.match(r"(.*?)\.(\d+)\.(.*)", name):
            found = layers.setdefault(match[1], {}).setdefault(int(match[2]), set())
            found.add((f"{match[1]}.{match[3]}", tensor.shape))
    stacks = [found for found in layers.values() if len(found) == count]
    assert stacks
    return [set[tuple[str, torch.Size]]().union(*(found[i] for found in stacks)) for i in range(count)]


@pytest.mark.parametrize("name", CASES)
def test_each_layer_is_as_in_its_model(name: str, tmp_path: Path) -> None:
    kind_name, entries, order = CASES[name]
    kind = getattr(transformers, kind_name)
    config = kind.config_class(**deepcopy(entries))
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    before = deepcopy(saved)
    stacked = stack_config(saved, [(saved, layer) for layer in order], 4)
    assert saved == before
    (tmp_path / "config.json").write_text(json.dumps(stacked))
    result = kind.config_class.from_pretrained(tmp_path)
    assert result.num_hidden_layers == len(order)
    for entry in REPORTED:
        if isinstance(was := getattr(config, entry, None), list) and entry != "kv_sharing_modes":
            assert getattr(result, entry) == [was[layer] for layer in order], entry
    one, two = layers_in(config, kind, 4), layers_in(result, kind, len(order))
    assert two == [one[layer] for layer in order]
    for place, layer in enumerate(order):
        assert kinds_of(stacked, place) == kinds_of(saved, layer)


PUBLISHED = (
    "afmoe axk1 cohere2 cohere2_moe deepseek_v32 exaone4 gemma2 gemma3 gemma3_text gemma4_text glm4_moe_lite gpt_oss "
    "llama4_text minimax modernbert olmo3 qwen2 qwen2_moe qwen3_next smollm3"
)
LISTS = "layer_types mlp_layer_types no_rope_layers layers_block_type indexer_types layer_rope_theta per_layer_config"


def entries_of(kind: str, **entries: Any) -> dict[str, Any]:
    """The config of a class with these entries, and all others as the class takes them."""
    config: dict[str, Any] = json.loads(json.dumps(CONFIG_MAPPING[kind](**entries).to_dict()))
    return config


def default_config(kind: str) -> dict[str, Any] | None:
    """The config that a class takes by itself; None if it cannot do without entries."""
    try:
        return entries_of(kind)
    except Exception:
        return None


def implied(kind: str) -> int:
    """Compare what a config says without its lists with the lists that its class makes; return how many these are."""
    config = default_config(kind)
    if config is None or not stacks_of(config):
        return 0
    path, keys, _ = stacks_of(config)[0]
    part: Any = part_at(config, path)
    taken = [entry for entry in LISTS.split() if part.pop(entry, None) is not None]
    part.update(dict.fromkeys(keys, 11))
    for entry in (
        "intermediate_size",
        "num_attention_heads_per_layer",
        "kv_source_layers",
        "activation_sparsity_pattern",
    ):
        if isinstance(part.get(entry), list):
            part[entry] = [*part[entry], *part[entry]][:11]
    if "kv_source_layers" in part:
        part["kv_source_layers"] = list(range(11))
    if not keys or not taken:  # only a list says how many layers there are
        return 0
    try:
        made: Any = CONFIG_MAPPING[kind].from_dict(deepcopy(config))
    except (
        ValueError,
        StrictDataclassError,
    ):  # other entries are for the number of layers that the class takes by itself
        return 0
    for key in path:
        made = getattr(made, key)
    facts = facts_of(part, model_of(config, path), 11)
    lists = {entry: value for entry in taken if isinstance(value := getattr(made, entry, None), list)}
    lists = {entry: value for entry, value in lists.items() if len(value) == 11}
    for entry, value in lists.items():
        if entry != "per_layer_config" and (entry in facts or any(each != value[0] for each in value)):
            assert list(facts[entry].values) == value, (kind, entry)
    return len(lists)


@pytest.mark.parametrize("kind", PUBLISHED.split())
def test_a_config_without_lists_says_the_same_as_its_class(kind: str) -> None:
    assert implied(kind)


@pytest.mark.slow
def test_all_configs_without_lists_say_the_same_as_their_classes() -> None:
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    assert sum(implied(kind) for kind in CONFIG_MAPPING) > 100


@pytest.mark.slow
def test_the_stacks_of_all_configs_have_the_lists_of_their_layers() -> None:
    """Whatever list a class has for its layers is that of the layers in the stack, or the stack is refused."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    wrong, seen = [], 0
    for kind, config in ((kind, default_config(kind)) for kind in CONFIG_MAPPING):
        if config is None or not stacks_of(config):
            continue
        size = stacks_of(config)[0].size
        order = [*range(size // 2), *range(size // 4, size)]
        try:
            stacked = stack_config(config, [(config, layer) for layer in order], size)
        except PlanError:
            continue
        one, two = (CONFIG_MAPPING[kind].from_dict(deepcopy(each)) for each in (config, stacked))
        for stack in stacks_of(config, size):
            parts: list[Any] = [one, two]
            for key in stack.path:
                parts = [getattr(part, key) for part in parts]
            for entry in REPORTED:
                was, now = (getattr(part, entry, None) for part in parts)
                if isinstance(was, list) and len(was) == size and entry != "kv_sharing_modes":
                    seen += 1
                    wrong += [(kind, entry)] if now != [was[layer] for layer in order] else []
    assert wrong == [] and seen > 200


@pytest.mark.parametrize("kind", ["gemma2", "olmo3", "qwen3_next", "modernbert"])
def test_a_period_of_the_class_becomes_a_list_where_it_breaks(kind: str) -> None:
    config = {"model_type": kind, "num_hidden_layers": 12}
    assert stack_config(config, [(config, layer) for layer in range(12)], 12) == config
    order = [0, 1, 2, 2, *range(3, 12)]
    stacked = stack_config(config, [(config, layer) for layer in order], 12)
    made = entries_of(kind, num_hidden_layers=12)
    assert stacked["layer_types"] == [made["layer_types"][layer] for layer in order]


def test_a_period_stays_while_it_holds_and_goes_beside_a_list() -> None:
    config = {"model_type": "qwen3_next", "num_hidden_layers": 4, "full_attention_interval": 2}
    layers = [0, 1, 0, 1, 2, 3]
    assert stack_config(config, [(config, layer) for layer in layers], 4) == {**config, "num_hidden_layers": 6}
    listed = config | {"layer_types": ["linear_attention", "full_attention"] * 2}
    stacked = stack_config(listed, [(listed, layer) for layer in REPEATED], 4)
    assert stacked == {
        "model_type": "qwen3_next",
        "num_hidden_layers": 5,
        "layer_types": [listed["layer_types"][layer] for layer in REPEATED],  # type: ignore[index]
    }


def test_the_text_of_a_model_of_images_is_stacked_and_its_tower_is_not(tmp_path: Path) -> None:
    kind = transformers.Gemma3ForConditionalGeneration
    text = TINY | {"sliding_window_pattern": 2, "rope_scaling": None}
    config: Any = transformers.Gemma3Config(text_config=text, vision_config={**VISION}, mm_tokens_per_image=4)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["vision_config"]["num_hidden_layers"] == saved["text_config"]["num_hidden_layers"] == 4
    saved["vision_config"]["deepstack_visual_indexes"] = [1, 2]
    stacked = stack_config(saved, [(saved, layer) for layer in REPEATED], 4)
    assert stacked["vision_config"] == saved["vision_config"]
    (tmp_path / "config.json").write_text(json.dumps(stacked))
    result: Any = transformers.Gemma3Config.from_pretrained(tmp_path)
    was = config.text_config.layer_types
    assert result.text_config.layer_types == [was[layer] for layer in REPEATED]
    (tmp_path / "config.json").write_text(json.dumps(stacked))
    one, two = (layers_in(each, kind, number) for each, number in ((config, 4), (result, 5)))
    text_of = [{(name, shape) for name, shape in layer if "language_model" in name} for layer in one]
    assert two == [text_of[layer] for layer in REPEATED]


def test_forms_of_entries() -> None:
    """Lists of layers from 0 and from 1, texts, letters, tables, nested lists, one number for all, and other lists."""
    config = {
        "num_hidden_layers": 4,
        "hidden_size": 8,
        "hybrid_override_pattern": "M-*E",
        "cross_attention_layers": [0, 3],  # the first and the last of the stack, too
        "moe_layers_enum": "2,3",
        "linear_attn_config": {"kda_layers": [1, 2], "full_attn_layers": [3, 4], "head_dim": 8},
        "per_layer_config": {"1": {"head_dim": 4}},
        "attn_config": {"num_key_value_heads": [1, 2, 3, 4]},
        "block_configs": [{"ffn": {"size": size}} for size in (1, 2, 3, 4)],
        "anything": ["a", "b", "c", "d"],
        "architectures": ["A", "B", "C", "D"],
        "rope_scaling": {"mrope_section": [1, 1, 1, 1]},
        "eos_token_id": [1, 2, 3, 4],
        "id2label": {"0": "a", "1": "b", "2": "c", "3": "d"},
        "num_key_value_heads": 2,
    }
    stacked = stack_config(config, [(config, layer) for layer in (3, 1, 1, 0, 2)], 4)
    changed = {key: value for key, value in stacked.items() if value != config[key]}
    assert changed == {
        "num_hidden_layers": 5,
        "hybrid_override_pattern": "E--M*",
        "moe_layers_enum": "0,4",
        "linear_attn_config": {"kda_layers": [2, 3, 4], "full_attn_layers": [1, 5], "head_dim": 8},
        "per_layer_config": {"1": {"head_dim": 4}, "2": {"head_dim": 4}},
        "attn_config": {"num_key_value_heads": [4, 2, 2, 1, 3]},
        "block_configs": [{"ffn": {"size": size}} for size in (4, 2, 2, 1, 3)],
        "anything": ["d", "b", "b", "a", "c"],
    }


def test_an_empty_list_is_that_of_the_class() -> None:
    """Llama 4's published configs have one, which stands for the layers by the interval."""
    config = {"model_type": "llama4_text", "num_hidden_layers": 4, "no_rope_layers": [], "no_rope_layer_interval": 2}
    assert stack_config(config, [(config, layer) for layer in (0, 1, 2, 3, 2, 3)], 4) == config | {
        "num_hidden_layers": 6
    }
    stacked = stack_config(config, [(config, layer) for layer in REPEATED], 4)
    assert stacked["no_rope_layers"] == [1, 0, 0, 1, 0] and "no_rope_layer_interval" not in stacked


def test_a_stack_shares_nothing_with_its_sources() -> None:
    config = {"num_hidden_layers": 2, "block_configs": [{"size": 1}, {"size": 2}]}
    stack_config(config, [(config, 1)], 2)["block_configs"][0]["size"] = 3
    assert config["block_configs"] == [{"size": 1}, {"size": 2}]


def test_layers_of_models_of_different_depths() -> None:
    """A list that both have is not one of layers; one number is that of each; a config may have its layers deeper."""
    one = {"model_type": "qwen2", "num_hidden_layers": 2, "numbers": [7, 9], "intermediate_size": 8}
    two = {
        "text_config": {"num_hidden_layers": 3, "model_type": "qwen2_text", "numbers": [7, 9]}
        | {"intermediate_size": [8, 16, 24], "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    }
    stacked = stack_config(one, [(one, 0), (two, 1), (two, 2), (one, 1)], 2)
    assert stacked == one | {
        "num_hidden_layers": 4,
        "intermediate_size": [8, 16, 24, 8],
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
    }
    assert stack_config(one, [(two, 0), (one, 1)], 2) == one | {"intermediate_size": 8}


def test_a_scale_by_the_number_of_layers_stays() -> None:
    """MiniCPM's residuals are scaled by scale_depth / sqrt(layers), which stays what it was."""
    config = {"model_type": "minicpm3", "num_hidden_layers": 4, "scale_depth": 1.4}
    stacked = stack_config(config, [(config, i % 4) for i in range(9)], 4)
    assert stacked["scale_depth"] / 9**0.5 == pytest.approx(1.4 / 4**0.5)


def test_a_tower_is_stacked_if_it_is_all_that_has_the_number() -> None:
    config = {
        "text_config": {"num_hidden_layers": 3},
        "vision_config": {"num_hidden_layers": 2, "layer_types": ["a", "b"]},
    }
    stacked = stack_config(config, [(config, 1), (config, 0), (config, 1)], 2)
    assert stacked["vision_config"] == {"num_hidden_layers": 3, "layer_types": ["b", "a", "b"]}
    assert stacked["text_config"] == config["text_config"]


def test_features_of_the_last_layer_are_those_of_the_last_layer() -> None:
    config = entries_of("dinov2", **VISION)
    stacked = stack_config(config, [(config, layer) for layer in REPEATED], 4)
    assert transformers.Dinov2Config.from_dict(stacked).out_indices == [5]


def test_kinds_tell_layers_apart_that_do_not_merge() -> None:
    config = {"model_type": "gemma2", "num_hidden_layers": 4}
    assert kinds_of(config, 0) == kinds_of(config, 2) == {"layer_types": "sliding_attention"}
    assert kinds_of(config, 1) == {"layer_types": "full_attention"}
    assert kinds_of({"text_config": config | {"num_experts": [1, 2, 3, 4]}}, 3) == {
        "text_config.layer_types": "full_attention",
        "text_config.num_experts": 4,
    }
    with pytest.raises(PlanError, match="no layer 4 in a model of 4 layers"):
        kinds_of(config, 4)


LLAMA: dict[str, Any] = {"num_hidden_layers": 4}
JAMBA = LLAMA | {"attn_layer_period": 2, "attn_layer_offset": 1}
REFUSED: dict[str, tuple[dict[str, Any], Sequence[int], str]] = {
    "threshold": (LLAMA | {"first_k_dense_replace": 2}, (0, 2, 1), r"first_k_dense_replace: 2 .*layer 2 .*'dense'"),
    "period": (JAMBA, (0, 0, 1), r"attn_layer_period: 2, attn_layer_offset: 1 .*layer 1 .*but layer 0.*'mamba'"),
    "unknown-period": (LLAMA | {"new_attention_interval": 2}, (0, 2, 1), "new_attention_interval: 2"),
    "unknown-layers": (LLAMA | {"new_layers": [1, 3]}, (1, 3, 2), r"new_layers: \[1, 3\] .*layer 0 would have False"),
    "shared": (LLAMA | {"num_kv_shared_layers": 2}, (0, 3, 1), "num_kv_shared_layers: 2"),
    "numbers": (LLAMA | {"scale_attn_by_inverse_layer_idx": True}, (1, 0), "scale_attn_by_inverse_layer_idx: True"),
    "last-layer": (
        LLAMA | {"model_type": "gemma4"} | {"layer_types": [*["sliding_attention"] * 3, "full_attention"]},
        (3, 0),
        "layer_types.*layer 1 would have 'full_attention'",
    ),
    "length": (
        LLAMA | {"layer_types": ["full_attention"] * 3},
        (0, 1),
        "layer_types has 3 entries, expected one for each of 4",
    ),
    "outside": (LLAMA, (0, 4), "no layer 4 in a model of 4 layers"),
    "outputs": (LLAMA | {"deepstack_visual_indexes": [1]}, (0, 1), r"deepstack_visual_indexes: \[1\]"),
    "pointers": (LLAMA | {"kv_source_layers": [0, 0, 2, 2]}, (0, 3), "kv_source_layers: layer 1 shares with layer 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_entries_that_cannot_be_reconciled_are_refused_by_name(name: str) -> None:
    config, order, message = REFUSED[name]
    with pytest.raises(PlanError, match=message):
        stack_config(config, [(config, layer) for layer in order], 4)


def test_refusals_about_other_configs() -> None:
    with pytest.raises(PlanError, match=r"no number of layers that is 3.*it has num_hidden_layers: 4"):
        stack_config(LLAMA, [], 3)
    with pytest.raises(PlanError, match="states no number of layers, expected num_hidden_layers"):
        stack_config(LLAMA, [({}, 0)], 4)
    short = {"model_type": "qwen2", "num_hidden_layers": 4, "layer_types": ["full_attention"] * 3}
    with pytest.raises(PlanError, match="layer_types has 3 entries"):
        stack_config(LLAMA | {"model_type": "qwen2"}, [(short, 3)], 4)
    windows = [{"model_type": "gemma2", "num_hidden_layers": 4, "sliding_window": size} for size in (8, 16)]
    stacked = stack_config(windows[0], [(windows[0], 0), (windows[1], 1)], 4)
    assert stacked == windows[0] | {"num_hidden_layers": 2}
    with pytest.raises(PlanError, match=r"sliding_window: 8 .*layer 0 would have 8, but layer 2, which it is, has 16"):
        stack_config(windows[0], [(windows[1], 2), (windows[0], 1)], 4)
    listed = LLAMA | {"kinds": ["a", "b", "c", "d"]}
    with pytest.raises(PlanError, match="kinds"):
        stack_config(LLAMA, [(LLAMA, 0), (listed, 1)], 4)
    with pytest.raises(PlanError, match="2 problems"):
        both = LLAMA | {"first_k_dense_replace": 1, "num_kv_shared_layers": 1}
        stack_config(both, [(both, 3), (both, 0)], 4)


def test_the_blocks_of_xlstm_are_its_layers_and_those_of_others_are_not() -> None:
    origins = [0, 1, 1, 2]
    for kind, blocks in (("xlstm", 4), ("eomt", 3)):
        config = {"model_type": kind, "num_hidden_layers": 3, "num_blocks": 3}
        stacked = stack_config(config, [(config, layer) for layer in origins], 3)
        assert (stacked["num_hidden_layers"], stacked["num_blocks"]) == (4, blocks)
