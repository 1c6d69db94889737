"""BERT: LayerNorm after each block, so that its gain acts on the skip path too; learned positions; all task heads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mergekit_lfm.arch.table import Group, Heads, Scale, Symmetries, Units, add_prefix, keep_outputs, read_table

MODEL_TYPES = ("bert",)

TABLE = """
embeddings.word_embeddings.weight                     vocab            residual
embeddings.position_embeddings.weight                 position         residual
embeddings.token_type_embeddings.weight               type             residual
embeddings.position_ids?                              position         position
embeddings.LayerNorm.weight                           residual
embeddings.LayerNorm.bias                             residual
encoder.layer.{l}.attention.self.query.weight         heads.{l}:query  residual'
encoder.layer.{l}.attention.self.query.bias           heads.{l}:query
encoder.layer.{l}.attention.self.key.weight           heads.{l}:key    residual'
encoder.layer.{l}.attention.self.key.bias             heads.{l}:key
encoder.layer.{l}.attention.self.value.weight         heads.{l}:value  residual'
encoder.layer.{l}.attention.self.value.bias           heads.{l}:value
encoder.layer.{l}.attention.output.dense.weight       residual         heads.{l}:output
encoder.layer.{l}.attention.output.dense.bias         residual
encoder.layer.{l}.attention.output.LayerNorm.weight   residual
encoder.layer.{l}.attention.output.LayerNorm.bias     residual
encoder.layer.{l}.intermediate.dense.weight           ffn.{l}          residual'
encoder.layer.{l}.intermediate.dense.bias             ffn.{l}
encoder.layer.{l}.output.dense.weight                 residual         ffn.{l}'
encoder.layer.{l}.output.dense.bias                   residual
encoder.layer.{l}.output.LayerNorm.weight             residual
encoder.layer.{l}.output.LayerNorm.bias               residual
pooler.dense.weight?                                  pooler           residual'
pooler.dense.bias?                                    pooler
"""
HEADS = """
cls.predictions.transform.dense.weight?               predictions      residual'
cls.predictions.transform.dense.bias?                 predictions
cls.predictions.transform.LayerNorm.weight?           predictions
cls.predictions.transform.LayerNorm.bias?             predictions
cls.predictions.decoder.weight?                       vocab            predictions'
cls.predictions.decoder.bias?                         vocab
cls.predictions.bias?                                 vocab
cls.seq_relationship.weight?                          class            pooler'
cls.seq_relationship.bias?                            class
classifier.weight?                                    class            pooler'
classifier.bias?                                      class
qa_outputs.weight?                                    class            residual'
qa_outputs.bias?                                      class
"""


def symmetries(config: Mapping[str, Any], names: Iterable[str]) -> Symmetries:
    """The table of a model with this config. Units that no head reads are outputs, such as a BertModel's residual."""
    names = set(names)
    layers, width, heads = (config[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    scale: Scale | None = "positive" if config.get("hidden_act") == "relu" else None
    groups: dict[str, Group] = {"residual": Units(width), "pooler": Units(width, "sign"), "predictions": Units(width)}
    for layer in range(layers):
        groups[f"heads.{layer}"] = Heads(heads, 1, width // heads, "linear")
        groups[f"ffn.{layer}"] = Units(config["intermediate_size"], scale)
    body, head = add_prefix(TABLE, "bert.", names), HEADS
    if not any(name.endswith("pooler.dense.weight") for name in names):
        head = head.replace("pooler'", "residual'")  # a classifier of tokens
    if config.get("tie_word_embeddings", True):
        head = re.sub(r"\bpredictions(?=['\s])", "residual", head)  # the embeddings read them
    table = body + head
    if any(name.endswith("LayerNorm.gamma") for name in names):  # the names in the first published files
        table = table.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    whole = read_table(table, groups, names, {"l": layers})
    headless = not any(name.startswith(("cls.", "classifier.", "qa_outputs.")) for name in names)
    read = {part.group for axes in whole.tensors.values() for axis in axes for part in axis if part.view == "'"}
    return keep_outputs(whole, {"pooler", "predictions"} - read | ({"residual"} if headless else set()))
