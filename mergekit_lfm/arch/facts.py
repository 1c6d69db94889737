"""Entries of a config that change what equal numbers mean: models that differ in one are not averaged unasked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_dim", "rotary_emb_base")
_HEADS = ("num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "head_dim", "num_experts_per_tok")
_STACKS = ("encoder_attention_heads", "decoder_attention_heads", "use_parallel_residual", "parallel_attn", "alibi")
_NORMS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps", "norm_epsilon")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")
_SCALES = (
    *("logit_scale", "logits_scaling", "final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar"),
    *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "scale_embedding", "scale_attn_weights"),
)
_FORMS = ("position_embedding_type", "patch_size", "image_size", "norm_topk_prob", "routed_scaling_factor")
ENTRIES = frozenset({"model_type", *_ROPE, *_HEADS, *_STACKS, *_NORMS, *_ACTIVATIONS, *_SCALES, *_FORMS})

TOKENS, FACTORS, EMPTY = "tokens", "factors", "empty"
# All that a recipe may allow: the entries, other tokens for an id, factors of adapters, and tensors of no elements.
FACTS = frozenset({*ENTRIES, TOKENS, FACTORS, EMPTY})


def stated_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that a config states, by their places in it, such as `text_config.rope_theta`."""
    return dict(_walk(config, ""))


def _walk(config: Mapping[str, Any], place: str) -> Iterator[tuple[str, Any]]:
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and not any(isinstance(part, Mapping) for part in rope.values()):
        config = {**config, "rope_scaling": _scaling(rope)}
        config.update({key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope})
    elif isinstance(rope := config.get("rope_scaling"), Mapping):
        config = {**config, "rope_scaling": _scaling(rope)}
    elif "rope_theta" in config:
        config = {**config, "rope_scaling": None}
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("config"):
            yield from _walk(value, f"{place}{key}.")
        elif key in ENTRIES and (value is not None or key == "rope_scaling"):
            yield place + key, json.loads(json.dumps(value, sort_keys=True))


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """How rotary positions are scaled, in one form for all versions of transformers; None if they are not."""
    scaling = {key: value for key, value in rope.items() if key not in ("type", "rope_theta", "partial_rotary_factor")}
    scaling["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    return None if scaling["rope_type"] == "default" else scaling
