"""Find the files in a model's folder that hold the weights, and read its config."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePath
from typing import Any

from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.files import read_json

# file names in transformers' order of preference
SINGLES = ("model.safetensors", "pytorch_model.bin")

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def leads_away(name: object) -> bool:
    """True unless `name` is a relative path that stays inside its folder, and that a file can have."""
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name.encode()) < 256:
        return True  # unprintable: NUL, lone surrogates
    return PurePath(name).is_absolute() or ".." in PurePath(name).parts


def is_outside(path: Path, folder: Path) -> bool:
    """True if a file of the folder is a link that leads out of it, other than to a blob of the Hub's cache."""
    home, place = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    return not (place.is_relative_to(home) or place.parent == blobs)


def weight_paths(folder: Path, names: Collection[str], label: object) -> tuple[list[Path], dict[str, str]]:
    """The weight files among a folder's files `names`, and the index's map from tensors to files, {} without one."""
    singles = [folder / name for name in SINGLES if name in names]
    indexes = [folder / name for name in INDEXES if name in names]
    safe = [path for path in (*singles, *indexes) if ".safetensors" in path.name]
    chosen = safe or [*singles, *indexes]
    if len(chosen) > 1:
        both = " and ".join(path.name for path in chosen)
        raise FormatError(f"{label} has both {both}: one of them is left from an earlier save; remove it")
    if not chosen:
        if any(name in names for name in ADAPTER):
            raise FormatError(
                f"{label} holds an adapter, not a model: merge it into its model first (peft's merge_and_unload)"
            )
        others = sorted(folder / name for name in names if name.endswith(".safetensors") and "/" not in name)
        if len(others) != 1:
            files = f"{len(others)} other .safetensors files" if others else "no .safetensors files"
            raise FormatError(f"{label} holds no model: expected {', '.join((*SINGLES, *INDEXES))}, found {files}")
        chosen = others
    if chosen[0].suffix != ".json":
        return chosen, {}
    index = read_json(chosen[0])
    try:
        weight_map = index["weight_map"]
        paths = [folder / str(name) for name in sorted(set(weight_map.values()))]
    except (KeyError, TypeError, AttributeError):
        raise FormatError(
            f"{label}/{chosen[0].name}: expected a weight_map from tensors to files; fetch it again"
        ) from None
    if not weight_map:
        raise FormatError(f"{label}/{chosen[0].name}: its weight_map names no tensor; fetch the index again")
    if away := [name for name in weight_map.values() if leads_away(name)]:
        raise FormatError(
            f"{label}/{chosen[0].name}: {away[0]!r:.60} is not a file of that folder; fetch the index again"
        )
    missing = sorted({*weight_map.values()} - {*names})
    if label == folder:  # a local folder's `names` lack the files of its subfolders
        missing = [name for name in missing if not (folder / name).exists()]
    if missing:
        raise FormatError(f"{label}: shards named in {chosen[0].name} are missing: {', '.join(missing)}; fetch them")
    return paths, weight_map


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, or {} without one, and for a path that is not a folder."""
    path = folder / "config.json"
    if not folder.is_dir() or not path.exists():
        return {}
    config = read_json(path)
    if not isinstance(config, dict):
        raise FormatError(f"{path}: expected an object, found a {type(config).__name__}")
    return config
