"""Helpers for tests of whole merges: recipes, the folder's tensors as others read them, the formula in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]
LINEAR = """\
merge_method: linear
models:
  - model: a
    parameters: {weight: 1}
  - model: b
    parameters: {weight: 3}
"""
TIES = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 0.6, density: 0.4}
  - model: b
    parameters: {weight: 0.5, density: 0.3}
"""


def write_recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def load_all(folder: Path) -> Tensors:
    """Every tensor of an output folder, by the safetensors library."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def average(a: Tensors, b: Tensors, dtype: torch.dtype) -> Tensors:
    """(a + 3 b) / 4 in float64, then in the dtype (by way of float32, as torch converts)."""
    return {name: ((a[name].double() + 3 * b[name].double()) / 4).to(dtype) for name in a}


def load_complete(kind: str, folder: Path) -> Any:
    """The model of a class of transformers in a folder, which has every tensor of the class and no other."""
    import transformers

    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, local_files_only=True)
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()
