"""Three tiny adapters of one model, as PEFT saves them, and what they do by PEFT's own rules, in numpy."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_adapters import tiny_model
from numpy.typing import NDArray
from safetensors.torch import load_file

Array = NDArray[np.float64]
LAYER = "model.layers.{}.self_attn.{}"
CONFIGS: dict[str, dict[str, Any]] = {
    "one": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "two": {
        "r": 2,
        "lora_alpha": 5,
        "use_rslora": True,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 4},
        "alpha_pattern": {"layers.1.mlp.down_proj": 7},
    },
    "three": {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "embed_tokens"]},
}


def save_lora(model: Any, folder: Path, seed: int, **config: Any) -> Path:
    """A LoRA of random matrices for the model, as PEFT saves it."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, x in wrapped.named_parameters():
                if "lora_" in name:
                    x.copy_(0.3 * torch.randn(x.shape, generator=generator))
                elif "modules_to_save" in name:
                    x.add_(0.3 * torch.randn(x.shape, generator=generator))
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.fixture(scope="session")
def trio(made_once: Callable[[str, Callable[[Path], object]], Path]) -> list[Path]:
    """The folders of three adapters of `tiny_model("llama")`: of several ranks, scales and modules."""

    def make(folder: Path) -> None:
        model = tiny_model("llama")
        for seed, (name, config) in enumerate(CONFIGS.items()):
            save_lora(model, folder / name, seed, **config)

    folder = made_once("trio", make)
    return [folder / name for name in CONFIGS]


def changes(folder: Path) -> dict[str, Array]:
    """The change of every module by an adapter, [out, in], of LoRAs alone. Source: Hu et al. 2021, equation 3."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {name: x.double().numpy() for name, x in load_file(folder / "adapter_model.safetensors").items()}
    found = {}
    for name, a in tensors.items():
        left, part, right = name.removeprefix("base_model.model.").partition(".lora_")
        if not part or not right.startswith(("A", "embedding_A")):
            continue
        b = tensors[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        r, alpha = (_stated(config[f"{key}_pattern"], left, config[own]) for key, own in PATTERNS)
        assert r == len(a)
        scale = alpha / np.sqrt(r) if config["use_rslora"] else alpha / r
        found[left] = scale * b.reshape(len(b), -1) @ a.reshape(len(a), -1)
    return found


PATTERNS = (("rank", "r"), ("alpha", "lora_alpha"))


def _stated(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if f".{module}".endswith(f".{key.lstrip('^')}")), default)


def sum_of(folders: list[Path], weights: list[float]) -> dict[str, Array]:
    """The weighted sums of the changes."""
    total: dict[str, Array] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, change in changes(folder).items():
            total[name] = total.get(name, np.zeros_like(change)) + weight * change
    return total
