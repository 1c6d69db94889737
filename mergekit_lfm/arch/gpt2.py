"""GPT-2: LayerNorm before each block, learned positions, fused queries, keys and values; weights stored [in, out]."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mergekit_lfm.arch.table import Group, Heads, Symmetries, Units, add_prefix, keep_outputs, read_table

MODEL_TYPES = ("gpt2",)

TABLE = """
wte.weight                      vocab                 residual
wpe.weight                      position              residual
h.{l}.ln_1.weight               residual:gain@attn.{l}
h.{l}.ln_1.bias                 residual:shift@attn.{l}
h.{l}.attn.bias?                position              position  position  position
h.{l}.attn.masked_bias?
h.{l}.attn.c_attn.weight        residual'@attn.{l}    heads.{l}:query|heads.{l}:key|heads.{l}:value
h.{l}.attn.c_attn.bias          heads.{l}:query|heads.{l}:key|heads.{l}:value
h.{l}.attn.c_proj.weight        heads.{l}:output      residual
h.{l}.attn.c_proj.bias          residual
h.{l}.ln_2.weight               residual:gain@mlp.{l}
h.{l}.ln_2.bias                 residual:shift@mlp.{l}
h.{l}.mlp.c_fc.weight           residual'@mlp.{l}     ffn.{l}
h.{l}.mlp.c_fc.bias             ffn.{l}
h.{l}.mlp.c_proj.weight         ffn.{l}'              residual
h.{l}.mlp.c_proj.bias           residual
ln_f.weight                     residual:gain@final
ln_f.bias                       residual:shift@final
"""
HEAD = """
lm_head.weight?                 vocab                 residual'@final
"""


def symmetries(config: Mapping[str, Any], names: Iterable[str]) -> Symmetries:
    """The table of a model with this config. The residual can be rotated if the head is not tied.

    The residual of a GPT2Model, which has no head, is its output.
    """
    names = list(names)
    width, heads = config["n_embd"], config["n_head"]
    untied = "lm_head.weight" in names and not config.get("tie_word_embeddings", True)
    relu = config.get("activation_function") == "relu"
    groups: dict[str, Group] = {"residual": Units(width, rotation="centred" if untied else None)}
    for layer in range(config["n_layer"]):
        groups[f"heads.{layer}"] = Heads(heads, 1, width // heads, "linear")
        groups[f"ffn.{layer}"] = Units(config.get("n_inner") or 4 * width, "positive" if relu else None)
    table = add_prefix(TABLE, "transformer.", names) + HEAD
    found = read_table(table, groups, names, {"l": config["n_layer"]})
    headless = "GPT2Model" in (config.get("architectures") or ())  # a tied head is not in the file
    return keep_outputs(found, {"residual"}) if headless else found
