"""A tiny base and two fine-tunes of it, to extract adapters from."""

from __future__ import annotations

from pathlib import Path

import torch
from models import save_checkpoint

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
MATRICES = [f"model.layers.{i}.self_attn.{part}_proj.weight" for i in range(2) for part in "qv"]
SHAPES: dict[str, tuple[int, ...]] = {**dict.fromkeys(MATRICES, (12, 10)), "model.norm.weight": (10,)}


def draw(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def save_trio(folder: Path) -> None:
    """Save `base`, and `one` and `two`, which differ from it in all tensors, into a folder."""
    base = draw(0)
    save_checkpoint(folder / "base", base, CONFIG)
    for seed, name in enumerate(("one", "two"), 1):
        save_checkpoint(folder / name, {key: base[key] + 0.3 * x for key, x in draw(seed).items()}, CONFIG)
