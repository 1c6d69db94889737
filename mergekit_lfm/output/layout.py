"""Lay out an output folder, its tensors and the files beside them: all offsets are known before a byte is written.

Without a size limit or a change of dtype the output has the template's files and tensor order. Otherwise tensors are
packed in the template's order into shards of at most the limit. Names keep the template's stem, so that the library
that opened the template finds them; tensors of a module's folder stay in that folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.checkpoint import Checkpoint, Layout
from mergekit_lfm.store.tensors import TensorSpec, encode_header

STEM = re.compile(r"(-\d{5}-of-\d{5})?(\.(safetensors|bin|pt|pth|ckpt|pth\.tar))?$")  # what follows the stem of a name
DEFAULT_SHARD = 5_000_000_000  # bytes; as in transformers and in the Hub's advice
METADATA = {"format": "pt"}  # older transformers releases refuse files without it
STANDARD = "model"  # the stem that transformers looks for
OF_BIN = "pytorch_model"  # the stem that it looks for in another format


@dataclass(frozen=True)
class Shard:
    """One output file: its name and its tensors in the order of their bytes.

    The name of a file in a module's folder begins with that folder, as do its tensors' names but for those in the file.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    congruent: int | None = None

    @property
    def folder(self) -> str:
        """The folder of its module, with a slash; "" for the model's own."""
        return _folder(self.name)

    def own_name(self, name: str) -> str:
        """The name of one of its tensors in the file."""
        return name.removeprefix(self.folder)

    @cached_property
    def _encoded(self) -> tuple[bytes, dict[str, int]]:
        if not self.folder:
            return encode_header(self.tensors, METADATA, self.congruent)
        specs = [replace(spec, name=self.own_name(spec.name)) for spec in self.tensors]
        header, offsets = encode_header(specs, METADATA, self.congruent)
        return header, {spec.name: offsets[own.name] for spec, own in zip(self.tensors, specs, strict=True)}

    @property
    def header(self) -> bytes:
        return self._encoded[0]

    @property
    def offsets(self) -> dict[str, int]:
        """Offset of each tensor's bytes in the file."""
        return self._encoded[1]

    @cached_property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(spec.nbytes for spec in self.tensors)


@dataclass(frozen=True)
class Index:
    """The index of a folder with several shards: its name, and the shards."""

    name: str
    shards: tuple[Shard, ...]

    @property
    def weight_map(self) -> dict[str, str]:
        """The shard of each tensor, by their names in the folder."""
        return {
            shard.own_name(spec.name): shard.own_name(shard.name) for shard in self.shards for spec in shard.tensors
        }


def indexes_of(shards: Sequence[Shard]) -> tuple[Index, ...]:
    """The index of each folder with several shards."""
    indexes = []
    for folder in dict.fromkeys(shard.folder for shard in shards):
        inside = tuple(shard for shard in shards if shard.folder == folder)
        if len(inside) > 1:
            indexes.append(Index(f"{_stem([shard.name for shard in inside])}.safetensors.index.json", inside))
    return tuple(indexes)


def lay_out(template: Checkpoint, tensors: Sequence[TensorSpec], max_shard_size: int | None) -> tuple[Shard, ...]:
    """The shards for the output `tensors`: the template's tensors in its order.

    Raises PlanError if a tensor of a module's folder has a name without that folder.
    """
    layout = template.layout
    stored = {name: dtype for part in layout for name, dtype in part.dtypes.items()}
    kept = all(part.data_start for part in layout) and all(stored.get(spec.name) == spec.dtype for spec in tensors)
    folders = {name: _folder(part.file) for part in layout for name in part.dtypes}
    for name in (spec.name for spec in tensors if not spec.name.startswith(folders.get(spec.name, ""))):
        raise PlanError(f"{name} is a tensor of the folder {folders[name]}: begin its new name with {folders[name]}")
    shards = list[Shard]()
    for folder in dict.fromkeys(_folder(part.file) for part in layout) or [""]:
        parts = [part for part in layout if _folder(part.file) == folder]
        specs = [spec for spec in tensors if folders.get(spec.name, "") == folder]
        names = {spec.name for spec in specs}
        full = all(not names.isdisjoint(part.dtypes) for part in parts)
        if max_shard_size is None and kept and layout and full:
            shards += _shards_of_template(parts, specs)
        else:
            shards += _pack(_stem([part.file for part in parts]), specs, max_shard_size or DEFAULT_SHARD)
    return tuple(shards)


def _folder(file: str) -> str:
    """The folder in the name of a file, with a slash; "" without one."""
    return file[: file.rfind("/") + 1]


def _stem(files: Sequence[str]) -> str:
    """The common part of the names of a model's files: what precedes the shard's number and the suffix.

    It is the one that transformers looks for if they have none in common, or its stem for another format.
    """
    folder = _folder(files[0]) if files else ""
    stems = {STEM.sub("", file.removeprefix(folder)) for file in files}
    stem = stems.pop() if len(stems) == 1 else STANDARD
    return folder + (STANDARD if stem == OF_BIN else stem)


def _shards_of_template(layout: Sequence[Layout], tensors: Sequence[TensorSpec]) -> list[Shard]:
    by_file: dict[str, list[TensorSpec]] = {part.file: [] for part in layout}
    homes = {name: part.file for part in layout for name in part.dtypes}
    for spec in tensors:
        by_file[homes[spec.name]].append(spec)
    starts = {part.file: part.data_start % 4096 for part in layout}
    if len(by_file) == 1:
        ((name, specs),) = by_file.items()
        return [Shard(f"{_stem([name])}.safetensors", tuple(specs), starts[name])]
    return [Shard(name, tuple(specs), starts[name]) for name, specs in by_file.items()]


def _pack(stem: str, tensors: Sequence[TensorSpec], limit: int) -> list[Shard]:
    """Fill shards greedily in order; a tensor larger than the limit gets a shard of its own."""
    bins: list[list[TensorSpec]] = []
    room = 0
    for spec in tensors:
        if not bins or spec.nbytes > room:
            bins.append([])
            room = limit
        bins[-1].append(spec)
        room -= spec.nbytes
    if len(bins) <= 1:
        return [Shard(f"{stem}.safetensors", tuple(tensors))]
    names = [f"{stem}-{i + 1:05d}-of-{len(bins):05d}.safetensors" for i in range(len(bins))]
    return [Shard(name, tuple(specs)) for name, specs in zip(names, bins, strict=True)]
