"""Tiny random models of texts, with a tokenizer whose tokens are bytes, saved as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

POSITIONS = 32
BOS, EOS = 0, 1  # the first tokens; the byte b is some token from 2 on
VOCABULARY = 258


def byte_tokenizer(*, special: bool = False, limit: int = POSITIONS) -> Any:
    """A token for each byte. `special`: texts are put between BOS and EOS, as sentence encoders do."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {entry: number for number, entry in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if special:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=limit
    )


def llama_config(**changes: Any) -> Any:
    """A Llama whose predictions depend strongly on the tokens before."""
    return transformers.LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": POSITIONS,
            "initializer_range": 0.6,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        }
        | changes
    )


def bert_config(**changes: Any) -> Any:
    """A Bert of one layer."""
    return transformers.BertConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": POSITIONS,
            "initializer_range": 0.6,
        }
        | changes
    )


def save_model(folder: Path, kind: str, config: Any, tokenizer: Any = None) -> Path:
    """Save a random model of transformers' class `kind`, and its tokenizer if given, in the folder."""
    torch.manual_seed(0)
    getattr(transformers, kind)(config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def write_lines(path: Path, *entries: Any) -> Path:
    """A JSONL file; strings are written as they are."""
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path
