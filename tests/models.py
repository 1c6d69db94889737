"""Writes tiny checkpoints as they lie on disk, and reads what a folder holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def save_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], *, shards: int = 1
) -> Path:
    """A new folder with a config and the weights: in one file, or dealt to so many, with an index."""
    folder.mkdir(parents=True)
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    names, weight_map = list(tensors), dict[str, str]()
    for i, file in enumerate(files):
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file under the folder, by its path there."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def output_of(folder: Path) -> dict[str, bytes]:
    """The files of an output as if it had another name, which its card has, whose digest the lock has."""
    files = files_of(folder)
    card = files["README.md"].decode()
    files["README.md"] = card.replace(f"# {folder.name}\n", "# OUT\n").replace(f"('{folder.name}", "('OUT").encode()
    lock = json.loads(files["merge.lock.json"])
    del lock["digest"], lock["files"]["README.md"]
    files["merge.lock.json"] = json.dumps(lock).encode()
    return files
