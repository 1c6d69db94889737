"""Find the files in a model's folder that hold the weights, and read its config."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.files import read_json
from mergekit_lfm.store.kinds import OTHERS, head_of, kind_of

# The weights' names in the order in which transformers and diffusers look for them; an index has the name and an end.
SINGLES = (
    "model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
INDEX_END = ".index.json"
INDEXES = tuple(f"{name}{INDEX_END}" for name in SINGLES)
MODULES = "modules.json"
ARCHIVE_ENDS = (".bin", ".pt", ".pth", ".ckpt", ".pth.tar")

# Names of files with weights, whatever the format, and of files with the state of a training.
WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|pth\.tar|distcp|gguf|ggml|onnx|onnx_data|h5|hdf5|keras|msgpack|tflite|mlmodel|ot|"
    r"npz|npy|nemo|engine|pdparams|llamafile)$"
)
STATE = re.compile(
    r"(^|/)((optimizer|scheduler|scaler|rng_state|random_states)[^/]*\.(pt|pth|bin|pkl|npz|safetensors)|"
    r"training_args\.\w+|trainer_state\.json|"
    r"events\.out\.tfevents[^/]*)$|(^|/)(checkpoint-\d+|global_step\d+|wandb|runs|lightning_logs)/"
)

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER = (ADAPTER_CONFIG, *ADAPTER_WEIGHTS)


def split_address(path: Path) -> tuple[Path, str] | None:
    """The file and the address in FILE#ADDRESS, None for a path that is not of this form or names no file."""
    for at in (i for i, char in enumerate(str(path)) if char == "#"):
        file, address = Path(str(path)[:at]), str(path)[at + 1 :]
        if address and file.is_file():
            return file, address
    return None


def leads_away(name: object) -> bool:
    """True unless `name` is a relative path that stays inside its folder, and that a file can have."""
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name.encode()) < 256:
        return True  # unprintable: NUL, lone surrogates
    return PurePath(name).is_absolute() or ".." in PurePath(name).parts


def files_under(folder: Path) -> list[str]:
    """The names of all files under a folder, sorted; a link to a folder counts as a file."""
    names = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        names += [(Path(place) / name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(names)


def is_outside(path: Path, folder: Path) -> bool:
    """True if a file of the folder is a link that leads out of it, other than to a blob of the Hub's cache."""
    home, place = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    return not (place.is_relative_to(home) or place.parent == blobs)


@dataclass(frozen=True)
class Weights:
    """The weight files of a folder, and the file of each tensor that the index names, {} without an index."""

    paths: tuple[Path, ...]
    homes: dict[str, Path]


def find_weights(folder: Path, names: Collection[str], label: object) -> Weights | None:
    """The weights among a folder's files `names`, None without any. Raises FormatError if they are of several sets."""
    chosen = _choose(folder, names, label)
    if len(chosen) > 1:
        both = " and ".join(path.name for path in chosen)
        raise FormatError(f"{label} has both {both}: one of them is left from an earlier save; remove it")
    if not chosen:
        return None
    return _read_index(folder, chosen[0], names, label) if chosen[0].suffix == ".json" else Weights((chosen[0],), {})


def _choose(folder: Path, names: Collection[str], label: object) -> list[Path]:
    """The files that may be a folder's weights, or their index: more than one if nothing says which."""
    here = sorted(name for name in names if "/" not in name and not name.startswith("."))
    for single in SINGLES:
        if known := [folder / name for name in (single, f"{single}{INDEX_END}") if name in here]:
            return known
    if any(name in names for name in ADAPTER):
        raise FormatError(f"{label} holds an adapter, not a model{_base_of(folder)}")
    indexes = [folder / name for name in here if is_index(folder / name)]
    if indexes:
        return [path for path in indexes if ".safetensors" in path.name] or indexes
    for ends in ((".safetensors",), ARCHIVE_ENDS):
        others = [folder / name for name in here if name.endswith(ends) and not STATE.search(name)]
        if len(others) == 1:
            return others
        if others:
            break
    return []


def _base_of(folder: Path) -> str:
    """The end of a message about an adapter in a model's place: how to name it with its model."""
    try:
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "MODEL"
    except (OSError, FormatError, AttributeError):
        base = "MODEL"
    return f": name it with its model, {base}+{folder}"


def is_adapter(folder: Path) -> bool:
    """True for a folder here with an adapter and no model."""
    return (folder / ADAPTER_CONFIG).is_file() and not any((folder / name).exists() for name in (*SINGLES, *INDEXES))


def find_adapter(folder: Path, names: Collection[str], label: object) -> Weights:
    """The weights of the adapter among a folder's files `names`. Raises FormatError without any."""
    found = [folder / name for name in ADAPTER_WEIGHTS if name in names]
    if not found:
        expected = " or ".join(ADAPTER_WEIGHTS)
        raise FormatError(f"{label} holds no adapter: expected {expected}, and {ADAPTER_CONFIG}")
    return Weights((found[0],), {})


def is_index(path: Path) -> bool:
    """True if a file is an index: it says in which file each tensor is."""
    if not path.name.endswith(INDEX_END) or not path.is_file():
        return False
    try:
        index = read_json(path)
    except FormatError:
        return False
    return isinstance(index, dict) and "weight_map" in index


def describe_lack(folder: Path, names: Collection[str]) -> str:
    """The end of a message about a folder without weights: the expected files, and those that are there."""
    here = sorted(name for name in names if "/" not in name)
    safe = [name for name in here if name.endswith(".safetensors")]
    found = f"{len(safe)} other .safetensors files" if safe else "no .safetensors files"
    kinds = {
        name: kind_of(head_of(folder / name)) for name in here if WEIGHTS.search(name) and (folder / name).is_file()
    }
    others = [f"{name}, {kind}; {OTHERS[kind]}" for name, kind in kinds.items() if kind in OTHERS]
    several = [name for name in here if name.endswith(ARCHIVE_ENDS) and not STATE.search(name)]
    found += "".join(f", but {other}" for other in others[:1])
    found += f", and {len(several)} archives, {', '.join(several[:3])}: name one" if len(several) > 1 else ""
    return f"expected {', '.join((*SINGLES[:2], *INDEXES[:2]))}, found {found}"


def _read_index(folder: Path, path: Path, names: Collection[str], label: object) -> Weights:
    index = read_json(path)
    try:
        weight_map = index["weight_map"]
        paths = tuple(folder / str(name) for name in sorted(set(weight_map.values())))
    except (KeyError, TypeError, AttributeError):
        raise FormatError(f"{label}/{path.name}: expected a weight_map from tensors to files; fetch it again") from None
    if not weight_map:
        raise FormatError(f"{label}/{path.name}: its weight_map names no tensor; fetch the index again")
    if away := [name for name in weight_map.values() if leads_away(name)]:
        raise FormatError(f"{label}/{path.name}: {away[0]!r:.60} is not a file of that folder; fetch the index again")
    missing = sorted(name for name in {*weight_map.values()} - {*names} if not os.path.lexists(folder / name))
    if missing:  # `names` may lack the files of folders inside
        raise FormatError(f"{label}: shards named in {path.name} are missing: {', '.join(missing)}; fetch them")
    return Weights(paths, {name: folder / file for name, file in weight_map.items()})


def read_modules(folder: Path) -> dict[str, str]:
    """The folders of the modules that sentence-transformers lists, and their classes, "" without one.

    Raises FormatError for paths that lead elsewhere.
    """
    modules = read_json(folder / MODULES)
    try:
        names = [entry["path"] for entry in modules]
        classes = [str(entry.get("type", "")) for entry in modules]
    except (TypeError, KeyError, AttributeError):
        names, classes = [None], [""]
    wrong = [name for name in names if name != "" and leads_away(name)]
    if wrong:
        raise FormatError(
            f"{folder / MODULES}: found {wrong[0]!r}, expected a list of modules, each with the path of a "
            "folder in this one"
        )
    return {PurePath(name).as_posix(): kind for name, kind in zip(names, classes, strict=True) if PurePath(name).parts}


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, or {} without one, and for a path that is not a folder."""
    path = folder / "config.json"
    if path.is_symlink() and not path.exists():
        raise FormatError(f"{path} is a link to {path.readlink()}, which is not there; download the model again")
    if not folder.is_dir() or not path.exists():
        return {}
    config = read_json(path)
    if not isinstance(config, dict):
        raise FormatError(f"{path}: expected an object, found a {type(config).__name__}")
    return config
