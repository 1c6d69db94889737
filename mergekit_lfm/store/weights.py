"""The weight files of a model, opened: the place of every tensor, in the model's own files and in those of its modules.

A tensor of a module's folder, as sentence-transformers saves them, has the folder before its name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.folder import (
    ADAPTER,
    MODULES,
    Weights,
    describe_lack,
    find_adapter,
    find_weights,
    is_outside,
    read_modules,
)
from mergekit_lfm.store.formats import WeightFile, open_weight_files
from mergekit_lfm.store.tensors import TensorSpec

if TYPE_CHECKING:
    from mergekit_lfm.store.snapshot import Snapshot


@dataclass
class OpenWeights:
    """The files, each with the folder of its module, "" for the model's own; by name the tensors' specs and places.

    A place is a file and the name there. dropped: tensors that a file holds besides, and why they are not read.
    """

    files: list[tuple[WeightFile, str]] = field(default_factory=list)
    specs: dict[str, TensorSpec] = field(default_factory=dict)
    places: dict[str, tuple[WeightFile, str]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def add(self, module: str, weights: Weights, snapshot: Snapshot | None, address: str = "") -> None:
        """Open the files of a module, or the model's own. Raises FormatError if a tensor has two places, or none."""
        files = {file.path: file for file in open_weight_files(weights.paths, snapshot, address)}
        self.files += [(file, module) for file in files.values()]
        for file in files.values():
            for own, (spec, _) in file.tensors.items():
                home, name = files.get(weights.homes.get(own, file.path), file), f"{module}/{own}" if module else own
                if home is not file and own in home.tensors:
                    self.dropped[name] = f"in {file.name} besides; the index places it in {home.name}"
                elif name in self.places:
                    raise FormatError(f"{file.path}: {name} is in {self.places[name][0].name} and in {file.name}")
                else:
                    self.places[name], self.specs[name] = (file, own), replace(spec, name=name) if module else spec
        held = {own for file in files.values() for own in file.tensors}
        absent = [own for own in weights.homes if own not in held]
        if absent:
            more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
            folder = weights.paths[0].parent
            raise FormatError(f"{folder}: the index names tensors that no shard holds: {', '.join(absent[:3])}{more}")


def open_weights(path: Path, snapshot: Snapshot | None, address: str) -> OpenWeights:
    """Open the weights of a model in a folder, here or on the Hub, or in a file. Raises FormatError without any."""
    opened = OpenWeights()
    if snapshot is None and not path.is_dir():
        if path.name in ADAPTER:
            raise FormatError(f"{path} is an adapter: name its folder with its model, as in MODEL+{path.parent}")
        opened.add("", Weights((path,), {}), None, address)
        return opened
    label, names = snapshot or path, _names_in(path, "", snapshot)
    try:
        weights = find_weights(path, names, label)
        if weights is None:
            raise FormatError(f"{label} holds no model: {describe_lack(path, names)}")
        opened.add("", weights, snapshot)
        modules = read_modules(path) if MODULES in names else {}
        for module in (name for name in modules if not is_outside(path / name, path)):
            weights = find_weights(path / module, _names_in(path, module, snapshot), f"{label}/{module}")
            if weights is not None:
                opened.add(module, weights, snapshot)
    except FormatError as error:
        if snapshot is None or snapshot.listed:
            raise
        from mergekit_lfm.store.hub.client import offline_variable

        raise FormatError(f"{error}. {offline_variable()} is set, so only files in the cache are used") from None
    return opened


def open_adapter_weights(path: Path, snapshot: Snapshot | None) -> OpenWeights:
    """Open the weights of an adapter in a folder, here or on the Hub, or in a file. Raises FormatError without any."""
    opened = OpenWeights()
    if snapshot is None and not path.is_dir():
        weights = Weights((path,), {})
    else:
        weights = find_adapter(path, _names_in(path, "", snapshot), snapshot or path)
    opened.add("", weights, snapshot)
    return opened


def _names_in(folder: Path, module: str, snapshot: Snapshot | None) -> list[str]:
    """The names of the files in a module's folder, "" for the model's own; on the Hub those in its folders, too."""
    if snapshot is None:
        return [path.name for path in (folder / module).iterdir()] if (folder / module).is_dir() else []
    prefix = f"{module}/" if module else ""
    return [name.removeprefix(prefix) for name in snapshot.sizes if name.startswith(prefix)]
