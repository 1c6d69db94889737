"""The heads of models: what stands beside the trunk for one task, its tensors, and the class without it.

A pooler is a part of the trunk that only some classes have. Source: the classes of transformers 5.24.
"""

from __future__ import annotations

import re

# Beside the trunk; `head` and the like only there, as vision towers have a `head` of their own.
HEAD = re.compile(
    r"(^|\.)(classifier|pre_classifier|classification_head|score|qa_outputs|cls|lm_head|vocab_projector|"
    r"vocab_transform|vocab_layer_norm)\."
    r"|(^|(?<!vision_model)\.)heads?\."
    r"|^(predictions|generator_predictions|generator_lm_head|discriminator_predictions|ctc_head|proj_out|embed_out|"
    r"multiple_choice_head|sequence_summary|logits_proj|mlm_head|projector)\."
    r"|^decoder\.(weight|bias)$|^final_logits_bias$"
)
POOLER = re.compile(r"(^|\.)pooler\.")
LABEL_KEYS = ("id2label", "label2id", "num_labels", "problem_type")

_CLASS = re.compile(r"(\w+?)(For[A-Z]\w*|LMHeadModel|WithLMHeadModel|DoubleHeadsModel|Model)")


def trunk_of(kind: str, model_type: str) -> str | None:
    """The class of a model without its head: BertModel for BertForSequenceClassification; None if it is not known.

    model_type: the config's. That of the language model in a model of images and text ends in `_text`.
    """
    match = _CLASS.fullmatch(kind)
    if match is None:
        return None
    return match[1] + ("Text" if model_type.endswith("_text") and not match[1].endswith("Text") else "") + "Model"
