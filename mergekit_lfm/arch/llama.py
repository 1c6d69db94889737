"""Llama, Mistral, Qwen2 and Qwen3: RMSNorm before each block, rotary positions, grouped queries, a gated MLP."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mergekit_lfm.arch.table import Group, Heads, Symmetries, Units, read_table

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

TABLE = """
model.embed_tokens.weight                           vocab            residual
model.layers.{l}.input_layernorm.weight             residual:gain@attn.{l}
model.layers.{l}.self_attn.q_proj.weight            heads.{l}:query  residual'@attn.{l}
model.layers.{l}.self_attn.k_proj.weight            heads.{l}:key    residual'@attn.{l}
model.layers.{l}.self_attn.v_proj.weight            heads.{l}:value  residual'@attn.{l}
model.layers.{l}.self_attn.q_proj.bias?             heads.{l}:query
model.layers.{l}.self_attn.k_proj.bias?             heads.{l}:key
model.layers.{l}.self_attn.v_proj.bias?             heads.{l}:value
model.layers.{l}.self_attn.q_norm.weight?           within_head
model.layers.{l}.self_attn.k_norm.weight?           within_head
model.layers.{l}.self_attn.rotary_emb.inv_freq?     within_head
model.layers.{l}.self_attn.o_proj.weight            residual         heads.{l}:output
model.layers.{l}.self_attn.o_proj.bias?             residual
model.layers.{l}.post_attention_layernorm.weight    residual:gain@mlp.{l}
model.layers.{l}.mlp.gate_proj.weight               ffn.{l}:order    residual'@mlp.{l}
model.layers.{l}.mlp.gate_proj.bias?                ffn.{l}:order
model.layers.{l}.mlp.up_proj.weight                 ffn.{l}          residual'@mlp.{l}
model.layers.{l}.mlp.up_proj.bias?                  ffn.{l}
model.layers.{l}.mlp.down_proj.weight               residual         ffn.{l}'
model.layers.{l}.mlp.down_proj.bias?                residual
model.norm.weight                                   residual:gain@final
lm_head.weight?                                     vocab            residual'@final
"""


def symmetries(config: Mapping[str, Any], names: Iterable[str]) -> Symmetries:
    """The table of a model with this config. The residual can be rotated if the head is not tied."""
    names = list(names)
    layers, width, heads = (config[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or width // heads
    normed = any(name.endswith("self_attn.q_norm.weight") for name in names)
    untied = "lm_head.weight" in names and not config.get("tie_word_embeddings")
    groups: dict[str, Group] = {"residual": Units(width, "sign", "orthogonal" if untied else None)}
    for layer in range(layers):
        groups[f"heads.{layer}"] = Heads(kv_heads, heads // kv_heads, head_dim, "signs" if normed else "phases")
        groups[f"ffn.{layer}"] = Units(config["intermediate_size"], "nonzero")
    return read_table(TABLE, groups, names, {"l": layers})
