"""Tiny seeded checkpoints in the shape of a Llama, as transformers names and saves them, and a way to merge them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from models import save_checkpoint
from safetensors.torch import load_file

import mergekit_lfm

HIDDEN, INNER, VOCAB = 64, 96, 260
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}

Tensors = dict[str, torch.Tensor]


def shapes(layers: int = 2) -> dict[str, tuple[int, ...]]:
    """Names and shapes: 21 tensors with two layers."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        found |= {f"{layer}.self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qo"}
        found |= {f"{layer}.self_attn.{part}_proj.weight": (HIDDEN // 2, HIDDEN) for part in "kv"}
        found |= {f"{layer}.mlp.{part}_proj.weight": (INNER, HIDDEN) for part in ("gate", "up")}
        found |= {f"{layer}.mlp.down_proj.weight": (HIDDEN, INNER)}
        found |= {f"{layer}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def base_tensors(seed: int = 0, layers: int = 2) -> Tensors:
    """Random float32 weights; those of norms near 1."""
    random = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=random) for name, shape in shapes(layers).items()}
    return {name: 1 + 0.1 * x if "norm" in name else 0.1 * x for name, x in made.items()}


def fine_tuned(base: Tensors, seed: int, scale: float = 0.02) -> Tensors:
    """`base` plus noise."""
    random = torch.Generator().manual_seed(seed)
    return {name: x + scale * torch.randn(x.shape, generator=random) for name, x in base.items()}


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """The same tensors in another dtype."""
    return {name: x.to(dtype) for name, x in tensors.items()}


def save(folder: Path, tensors: Tensors) -> Path:
    """Writes a checkpoint that transformers would load."""
    dtype = DTYPES[tensors["lm_head.weight"].dtype]
    layers = sum(name.endswith("q_proj.weight") for name in tensors)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
    return save_checkpoint(folder, tensors, config)


def load(folder: Path) -> Tensors:
    """All tensors of a checkpoint, in any number of shards."""
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"no weights in {folder}"
    return {name: x for file in files for name, x in load_file(file).items()}


def entries(*models: Path, **parameters: Any) -> list[dict[str, Any]]:
    """Lines of `models`; each parameter is a list, one value per model."""
    return [
        {"model": str(model), "parameters": {name: values[i] for name, values in parameters.items()}}
        for i, model in enumerate(models)
    ]


def merger(tmp_path: Path) -> Callable[..., Tensors]:
    """Merges a recipe into a new folder below `tmp_path` and loads the result."""
    count = iter(range(1000))

    def run(recipe: Mapping[str, Any], **options: Any) -> Tensors:
        out = tmp_path / f"out-{next(count)}"
        assert mergekit_lfm.merge(dict(recipe), out, **options).path == out
        return load(out)

    return run
