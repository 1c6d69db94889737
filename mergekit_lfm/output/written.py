"""Folders of models that transformers writes: the files beside the weights, and the lock."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_lfm.output.lock import LOCK
from mergekit_lfm.output.request import Request
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.durable import replace_file, sync_folder
from mergekit_lfm.store.files import read_bytes
from mergekit_lfm.store.sidecars import sidecars_of

CONFIG = "config.json"


def copy_sidecars(source: Checkpoint, folder: Path) -> None:
    """Copy the files beside a model's weights into a folder, but for its config."""
    for name, path in sidecars_of(source).files:
        if name != CONFIG:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            replace_file(folder / name, read_bytes(path))


def lock_written(folder: Path, request: Request, result: Mapping[str, Any]) -> None:
    """Write the lock of a folder whose other files are all there. result: facts that only making it shows."""
    written, headers, locked = open_checkpoint(folder), dict[str, bytes](), []
    for part in written.layout:
        with (folder / part.file).open("rb") as file:
            length = file.read(8)
            headers[part.file] = length + file.read(int.from_bytes(length, "little"))
        locked += [(written[name], part.file, written.digest_of(name)) for name in part.dtypes]
    others = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in headers and not path.name.endswith(".unfinished")
    }
    replace_file(folder / LOCK, request.lock(others, headers, locked, result))
    sync_folder(folder)


def stored_tensors(model: Any, added: Mapping[str, object], source: Checkpoint) -> dict[str, Any]:
    """A model's tensors, those that it has from a checkpoint in the checkpoint's dtypes. added: the others, by name."""
    tensors = dict(model.state_dict())
    for name in tensors.keys() - {*added}:
        stored = stored_name(model, name, tensors[name], source)
        if stored is not None:
            tensors[name] = source.read(stored).view(source[stored].shape)
    return tensors


def stored_name(model: Any, name: str, x: Any, source: Checkpoint) -> str | None:
    """The tensor of a checkpoint that a model's parameter is by its name, with or without the trunk's prefix.

    None without one of its shape.
    """
    trunk = f"{getattr(model, 'base_model_prefix', '')}."
    names = (name, name.removeprefix(trunk), f"{trunk}{name}")
    return next((each for each in names if each in source and source[each].shape == tuple(x.shape)), None)
