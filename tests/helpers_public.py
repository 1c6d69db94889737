"""Stand-ins for the models of public recipes: the names and numbers of layers of theirs, with four numbers in a row."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from models import save_checkpoint

PUBLIC = Path(__file__).parent / "recipe" / "public"  # recipes in the forms of public ones
ABSOLUTE = "/home/somebody/models"  # the folder of models on somebody's machine, in one of them
WIDTH, TOKENS = 4, 16
LAYERS = {r"70b": 80, r"13b": 40, r"14B": 48, r"Qwen2-7B|VL-7B|千问": 28, r"MTP": 6}  # of a name; others have 32
VECTORS = ("input_layernorm", "post_attention_layernorm")
MATRICES = (
    *(f"self_attn.{side}_proj" for side in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)
CHATML = ("<|im_start|>", "<|im_end|>")  # tokens that a model of chats has beside those of its base


def count_layers(name: str) -> int:
    """The number of layers of the model with this name."""
    return next((count for pattern, count in LAYERS.items() if re.search(pattern, name, re.IGNORECASE)), 32)


def save_stand_in(root: Path, name: str) -> None:
    """A model for a name in a recipe, under that name in the folder, with numbers of its own."""
    path, _, adapter = name.partition("+")
    folder = root / path
    if adapter and not (root / adapter).exists():
        _save_adapter(root / adapter, count_layers(path))
    if folder.exists():
        return
    draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    further = len(CHATML) if "chatml" in name else 0
    shapes = dict(_shapes(name, TOKENS + further))
    tensors = {key: torch.randn(shape, generator=draw).bfloat16() for key, shape in shapes.items()}
    save_checkpoint(folder, tensors, _config(name, TOKENS + further))
    tokens = [f"t{i}" for i in range(TOKENS)] + list(CHATML[:further])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def _shapes(name: str, tokens: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    text = "model.language_model" if "VL" in name else "model"
    yield f"{text}.embed_tokens.weight", (tokens, WIDTH)
    yield from _stack(f"{text}.layers", count_layers(name))
    yield f"{text}.norm.weight", (WIDTH,)
    yield "lm_head.weight", (tokens, WIDTH)
    if "VL" in name:
        yield "model.visual.patch_embed.proj.weight", (WIDTH, 3, 2, 2)
        for part in (f"model.visual.blocks.{i}" for i in range(4)):
            yield from ((f"{part}.{name}.weight", (WIDTH, WIDTH)) for name in ("attn.qkv", "attn.proj", "mlp.up_proj"))
        yield "model.visual.merger.mlp.0.weight", (WIDTH, WIDTH)
    if "MTP" in name:
        yield from _stack("mtp.layers", 1)
        yield "mtp.fc.weight", (WIDTH, 2 * WIDTH)


def _stack(prefix: str, count: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for i in range(count):
        yield from ((f"{prefix}.{i}.{part}.weight", (WIDTH,)) for part in VECTORS)
        yield from ((f"{prefix}.{i}.{part}.weight", (WIDTH, WIDTH)) for part in MATRICES)


def _config(name: str, tokens: int) -> dict[str, Any]:
    text = {"num_hidden_layers": count_layers(name), "hidden_size": WIDTH, "vocab_size": tokens}
    if "VL" in name:
        return {"model_type": "qwen2_5_vl", "text_config": text, "vision_config": {"depth": 4}}
    return {"model_type": "llama", "tie_word_embeddings": False, **text}


def _save_adapter(folder: Path, layers: int) -> None:
    """An adapter of rank 2 of every query."""
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{side}.weight": torch.randn(shape, generator=draw)
        for i in range(layers)
        for side, shape in {"A": (2, WIDTH), "B": (WIDTH, 2)}.items()
    }
    save_checkpoint(folder, tensors, {})
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def put(path: Path, root: Path, encoding: str = "utf-8", newline: str = "\n") -> Path:
    """The recipe in the folder of its stand-ins, which are made if they are not there."""
    text = path.read_text("utf-8").replace(ABSOLUTE, f"{root}/local")
    documents = [data for data in yaml.safe_load_all(text) if data]
    for name in sorted(names_in(documents, (data.get("name", "") for data in documents))):
        save_stand_in(root, name)
    copy = root / path.name
    copy.write_text(text, encoding, newline=newline)
    return copy


def names_in(data: Any, stages: Iterable[str] = ()) -> set[str]:
    """The models that a recipe, as YAML gives it, names, but for the results of its stages."""
    names = set(_find_names(data))
    return names - set(stages)


def _find_names(data: Any) -> Iterator[str]:
    if isinstance(data, list):
        for part in data:
            yield from _find_names(part)
    for key, value in data.items() if isinstance(data, Mapping) else ():
        while isinstance(value, Mapping) and key in ("model", "base_model") and "model" in value:
            value = value["model"]
        if key in ("model", "base_model"):
            path = value if isinstance(value, str) else value["path"]
            revision = None if isinstance(value, str) else value.get("revision")
            yield path if revision is None else f"{path}@{revision}"
        else:
            yield from _find_names(value)
