"""Models of layers and towers in a few numbers, and what a recipe makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from helpers_merges import Tensors, load_all
from models import save_checkpoint

from mergekit_lfm import merge

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def layer_names(count: int, before: str = "model.layers.") -> list[str]:
    """The tensors of so many layers: one of the attention and one of the other half of each."""
    return [f"{before}{i}.{part}.weight" for i in range(count) for part in ("self_attn.o_proj", "mlp.down_proj")]


def make(seed: int, names: Sequence[str]) -> Tensors:
    """Random numbers for these names."""
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn((4, 3), generator=draw) for name in names}


def make_stack(folder: Path, name: str, seed: int, layers: int = 4, **config: Any) -> Tensors:
    """A model of layers, saved under its name."""
    tensors = make(seed, [EMBEDDING, *layer_names(layers), NORM, HEAD])
    settings = {"model_type": "llama", "num_hidden_layers": layers, "tie_word_embeddings": False}
    save_checkpoint(folder / name, tensors, settings | config)
    return tensors


def source(model: str, first: int, last: int, **parameters: Any) -> dict[str, Any]:
    """A source of a slice."""
    more = {"parameters": parameters} if parameters else {}
    return {"model": model, "layer_range": [first, last], **more}


def stack(*slices: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """A recipe of slices, each the list of its sources."""
    return {"merge_method": "passthrough", "slices": [{"sources": list(sources)} for sources in slices], **more}


def made(recipe: Mapping[str, Any], folder: Path, out: str = "out", **options: Any) -> Tensors:
    """The result of a recipe whose models are named by their folders."""
    return load_all(Path(merge(place(recipe, folder), folder / out, **options)))


def place(data: Any, folder: Path) -> Any:
    """The recipe with paths in place of the models' names."""
    if isinstance(data, Mapping):
        return {
            key: str(folder / value) if key in ("model", "base_model", "path") and isinstance(value, str) else value
            for key, value in ((key, place(value, folder)) for key, value in data.items())
        }
    return [place(each, folder) for each in data] if isinstance(data, list) else data


def moved(tensors: Tensors, layer: int, to: int, before: str = "model.layers.") -> Tensors:
    """The tensors of a layer, under the names of another."""
    old, new = f"{before}{layer}.", f"{before}{to}."
    return {name.replace(old, new): x for name, x in tensors.items() if name.startswith(old)}


def stacked(*layers: tuple[Tensors, int], first: Tensors, last: Tensors) -> Tensors:
    """A model of these layers, with the embedding of one model and the norm and the head of another."""
    found = {EMBEDDING: first[EMBEDDING], NORM: last[NORM], HEAD: last[HEAD]}
    for to, (tensors, layer) in enumerate(layers):
        found |= moved(tensors, layer, to)
    return found


def assert_same(merged: Tensors, expected: Tensors) -> None:
    """The same names and bits."""
    assert merged.keys() == expected.keys()
    assert [name for name, x in expected.items() if not torch.equal(merged[name], x)] == []
