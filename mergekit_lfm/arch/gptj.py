"""GPT-J: attention and MLP read the same LayerNorm side by side; rotary positions in part of each head.

The positions rotate pairs of neighbours (2i, 2i + 1) of a head's first `rotary_dim` units, not (i, i + head_dim / 2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mergekit_lfm.arch.table import Group, Heads, Symmetries, Units, add_prefix, keep_outputs, read_table

MODEL_TYPES = ("gptj",)

TABLE = """
wte.weight                       vocab                 residual
h.{l}.ln_1.weight                residual:gain@block.{l}
h.{l}.ln_1.bias                  residual:shift@block.{l}
h.{l}.attn.bias?                 position              position  position  position
h.{l}.attn.masked_bias?
h.{l}.attn.q_proj.weight         heads.{l}:query       residual'@block.{l}
h.{l}.attn.k_proj.weight         heads.{l}:key         residual'@block.{l}
h.{l}.attn.v_proj.weight         heads.{l}:value       residual'@block.{l}
h.{l}.attn.out_proj.weight       residual              heads.{l}:output
h.{l}.mlp.fc_in.weight           ffn.{l}               residual'@block.{l}
h.{l}.mlp.fc_in.bias             ffn.{l}
h.{l}.mlp.fc_out.weight          residual              ffn.{l}'
h.{l}.mlp.fc_out.bias            residual
ln_f.weight                      residual:gain@final
ln_f.bias                        residual:shift@final
"""
HEAD = """
lm_head.weight?                  vocab                 residual'@final
lm_head.bias?                    vocab
"""


def symmetries(config: Mapping[str, Any], names: Iterable[str]) -> Symmetries:
    """The table of a model with this config. The residual can be rotated if the head is not tied.

    The residual of a GPTJModel, which has no head, is its output.
    """
    names = list(names)
    layers, width, heads = (config[key] for key in ("n_layer", "n_embd", "n_head"))
    untied = "lm_head.weight" in names and not config.get("tie_word_embeddings")
    relu = config.get("activation_function") == "relu"
    groups: dict[str, Group] = {"residual": Units(width, rotation="centred" if untied else None)}
    for layer in range(layers):
        groups[f"heads.{layer}"] = Heads(heads, 1, width // heads, "fixed")
        groups[f"ffn.{layer}"] = Units(config.get("n_inner") or 4 * width, "positive" if relu else None)
    found = read_table(add_prefix(TABLE, "transformer.", names) + HEAD, groups, names, {"l": layers})
    headless = "GPTJModel" in (config.get("architectures") or ())  # a tied head is not in the file
    return keep_outputs(found, {"residual"}) if headless else found
