"""Tiny llamas with byte-level tokenizers of 260 tokens and some more, as transformers saves them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from helpers_merges import Tensors, load_all

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SPECIALS = ("<unk>", "<s>", "</s>", "<pad>")
SIZE = 260  # 256 bytes and four special tokens


def make_tokenizer(added: Sequence[str] = (), template: str | None = None, **roles: str) -> Any:
    """A byte-level tokenizer with further tokens."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIALS])
    tokenizer.add_tokens([*added])
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | roles
    make: Any = transformers.PreTrainedTokenizerFast
    fast = make(tokenizer_object=tokenizer, **named)
    fast.chat_template = template
    return fast


def save_llama(
    folder: Path,
    seed: int,
    added: Sequence[str] = (),
    *,
    padding: int = 0,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] | None = None,
    **of_tokenizer: Any,
) -> Tensors:
    """A random llama with a row for each token, and rows of padding behind them; its tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fast = make_tokenizer(added, **of_tokenizer)
    torch.manual_seed(seed)
    ids = {f"{role}_token_id": getattr(fast, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    rows = SIZE + len(added) + padding
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, vocab_size=rows, tie_word_embeddings=tied, **{**ids, **(config or {})})  # type: ignore[arg-type]
    )
    model.to(dtype).save_pretrained(folder)  # type: ignore[arg-type]
    fast.save_pretrained(folder)
    return load_all(folder)


def recipe_of(folder: Path, *names: str, **more: Any) -> dict[str, Any]:
    """A linear merge of the models in a folder, with the weights 1, 2, 3, ..."""
    lines = [{"model": str(folder / name), "parameters": {"weight": i + 1.0}} for i, name in enumerate(names)]
    return {"merge_method": "linear", "models": lines, **more}


def read_tokens(folder: Path) -> dict[str, int]:
    """The ids of a tokenizer's tokens, by the library."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


def read_config(folder: Path, name: str = "config.json") -> Any:
    return json.loads((folder / name).read_text())
