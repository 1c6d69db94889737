"""Tiny random models of every architecture that has a symmetry table, run with other tensors in place of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.func import functional_call

from mergekit_lfm.store.checkpoint import open_checkpoint

VOCAB = 30
GPT2 = {"n_embd": 24, "n_head": 3, "n_layer": 2, "vocab_size": VOCAB, "n_positions": 16, "bos_token_id": 0}
NEO = {
    "hidden_size": 24,
    "num_heads": 3,
    "num_layers": 2,
    "attention_types": [[["local", "global"], 1]],
    "window_size": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 16,
}
GPTJ = GPT2 | {"rotary_dim": 4}
BERT = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "vocab_size": VOCAB,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
}
BASIC = {"layer_type": "basic", "embedding_size": 6, "hidden_sizes": [6, 12], "depths": [2, 1], "num_labels": 3}
BOTTLENECK = {**BASIC, "layer_type": "bottleneck", "hidden_sizes": [8, 16]}

# Name: the class's stem and its head, and entries of its config; each is one case of a test.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2", "LMHeadModel", GPT2 | {"eos_token_id": 0}),
    "gpt2-untied": ("GPT2", "LMHeadModel", GPT2 | {"eos_token_id": 0, "tie_word_embeddings": False}),
    "gpt2-relu": ("GPT2", "LMHeadModel", GPT2 | {"eos_token_id": 0, "activation_function": "relu", "n_inner": 20}),
    "gpt2-headless": ("GPT2", "Model", GPT2 | {"eos_token_id": 0}),
    "gpt-neo": ("GPTNeo", "ForCausalLM", NEO),
    "gpt-neo-untied": ("GPTNeo", "ForCausalLM", NEO | {"tie_word_embeddings": False, "activation_function": "relu"}),
    "gpt-neo-headless": ("GPTNeo", "Model", NEO),
    "gpt-j": ("GPTJ", "ForCausalLM", GPTJ),
    "gpt-j-whole-heads": ("GPTJ", "ForCausalLM", GPTJ | {"rotary_dim": 8}),
    "gpt-j-tied": ("GPTJ", "ForCausalLM", GPTJ | {"tie_word_embeddings": True, "activation_function": "relu"}),
    "gpt-j-headless": ("GPTJ", "Model", GPTJ),
    "bert": ("Bert", "ForMaskedLM", BERT),
    "bert-untied": ("Bert", "ForMaskedLM", BERT | {"tie_word_embeddings": False, "hidden_act": "relu"}),
    "bert-pretraining": ("Bert", "ForPreTraining", BERT),
    "bert-classifier": ("Bert", "ForSequenceClassification", BERT),
    "bert-tokens": ("Bert", "ForTokenClassification", BERT),
    "bert-answers": ("Bert", "ForQuestionAnswering", BERT),
    "bert-headless": ("Bert", "Model", BERT),
    "llama": ("Llama", "ForCausalLM", LLAMA),
    "llama-biases": ("Llama", "ForCausalLM", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("Llama", "ForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "llama-mha": ("Llama", "ForCausalLM", LLAMA | {"num_key_value_heads": 4}),
    "llama-one-key": ("Llama", "ForCausalLM", LLAMA | {"num_key_value_heads": 1}),
    "mistral": ("Mistral", "ForCausalLM", LLAMA),
    "qwen2": ("Qwen2", "ForCausalLM", {**LLAMA, "head_dim": None}),
    "qwen2-tied": ("Qwen2", "ForCausalLM", {**LLAMA, "head_dim": None, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", "ForCausalLM", LLAMA | {"head_dim": 16}),
    "qwen3-tied": ("Qwen3", "ForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "resnet-basic": ("ResNet", "ForImageClassification", BASIC),
    "resnet-bottleneck": ("ResNet", "ForImageClassification", BOTTLENECK),
    "resnet-gelu": ("ResNet", "ForImageClassification", BASIC | {"hidden_act": "gelu"}),
    "resnet-headless": ("ResNet", "Model", BOTTLENECK),
}


class Subject(NamedTuple):
    """A saved model. run: all its outputs, [inputs, n], with these tensors in place of its own."""

    folder: Path
    tensors: dict[str, Tensor]
    run: Callable[[Mapping[str, Tensor]], Tensor]
    config: dict[str, Any]


def tiny(name: str, folder: Path, dtype: torch.dtype = torch.float64) -> Subject:
    """One of MODELS with random weights, saved in the folder."""
    stem, head, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(**{key: v for key, v in options.items() if v is not None})
    model = getattr(transformers, stem + head)(config).eval().to(dtype)
    model.save_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    tensors = {name: checkpoint.read(name).view(spec.shape) for name, spec in checkpoint.items()}
    return Subject(folder, tensors, runner(model, inputs_of(stem, dtype)), checkpoint.config)


def inputs_of(stem: str, dtype: torch.dtype) -> dict[str, Any]:
    """Three random inputs."""
    draw = torch.Generator().manual_seed(0)
    if stem == "ResNet":
        return {"pixel_values": torch.randn(3, 3, 32, 32, dtype=dtype, generator=draw)}
    ids = torch.randint(VOCAB, (3, 9), generator=draw)
    return {"input_ids": ids} | ({"token_type_ids": (ids > 9).long()} if stem == "Bert" else {"use_cache": False})


def runner(model: torch.nn.Module, inputs: dict[str, Any]) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """All outputs of the model, [inputs, n]."""

    def run(tensors: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            found = functional_call(model, dict(tensors), (), inputs)
        return torch.cat([x.flatten(1) for x in found.to_tuple()], 1)

    return run
