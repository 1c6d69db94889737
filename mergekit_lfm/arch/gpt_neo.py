"""GPT-Neo: LayerNorm before each block, learned positions; some layers attend to the last few tokens only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mergekit_lfm.arch.table import Group, Heads, Symmetries, Units, add_prefix, keep_outputs, read_table

MODEL_TYPES = ("gpt_neo",)

TABLE = """
wte.weight                                 vocab                 residual
wpe.weight                                 position              residual
h.{l}.ln_1.weight                          residual:gain@attn.{l}
h.{l}.ln_1.bias                            residual:shift@attn.{l}
h.{l}.attn.attention.bias?                 position              position  position  position
h.{l}.attn.attention.masked_bias?
h.{l}.attn.attention.q_proj.weight         heads.{l}:query       residual'@attn.{l}
h.{l}.attn.attention.k_proj.weight         heads.{l}:key         residual'@attn.{l}
h.{l}.attn.attention.v_proj.weight         heads.{l}:value       residual'@attn.{l}
h.{l}.attn.attention.out_proj.weight       residual              heads.{l}:output
h.{l}.attn.attention.out_proj.bias         residual
h.{l}.ln_2.weight                          residual:gain@mlp.{l}
h.{l}.ln_2.bias                            residual:shift@mlp.{l}
h.{l}.mlp.c_fc.weight                      ffn.{l}               residual'@mlp.{l}
h.{l}.mlp.c_fc.bias                        ffn.{l}
h.{l}.mlp.c_proj.weight                    residual              ffn.{l}'
h.{l}.mlp.c_proj.bias                      residual
ln_f.weight                                residual:gain@final
ln_f.bias                                  residual:shift@final
"""
HEAD = """
lm_head.weight?                            vocab                 residual'@final
"""


def symmetries(config: Mapping[str, Any], names: Iterable[str]) -> Symmetries:
    """The table of a model with this config. The residual can be rotated if the head is not tied.

    The residual of a GPTNeoModel, which has no head, is its output.
    """
    names = list(names)
    layers, width, heads = (config[key] for key in ("num_layers", "hidden_size", "num_heads"))
    untied = "lm_head.weight" in names and not config.get("tie_word_embeddings", True)
    relu = config.get("activation_function") == "relu"
    groups: dict[str, Group] = {"residual": Units(width, rotation="centred" if untied else None)}
    for layer in range(layers):
        groups[f"heads.{layer}"] = Heads(heads, 1, width // heads, "linear")
        groups[f"ffn.{layer}"] = Units(config.get("intermediate_size") or 4 * width, "positive" if relu else None)
    found = read_table(add_prefix(TABLE, "transformer.", names) + HEAD, groups, names, {"l": layers})
    headless = "GPTNeoModel" in (config.get("architectures") or ())  # a tied head is not in the file
    return keep_outputs(found, {"residual"}) if headless else found
