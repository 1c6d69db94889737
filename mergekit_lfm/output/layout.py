"""Lay out an output folder, its tensors and the files beside them: all offsets are known before a byte is written.

Without a size limit or a change of dtype the output has the template's files and tensor order. Otherwise tensors are
packed in the template's order into shards of at most the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mergekit_lfm.store.checkpoint import Checkpoint, Layout
from mergekit_lfm.store.tensors import TensorSpec, encode_header

DEFAULT_SHARD = 5_000_000_000  # bytes; as in transformers and in the Hub's advice
METADATA = {"format": "pt"}  # older transformers releases refuse files without it
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shard:
    """One output file: its name and its tensors in the order of their bytes."""

    name: str
    tensors: tuple[TensorSpec, ...]
    congruent: int | None = None

    @cached_property
    def _encoded(self) -> tuple[bytes, dict[str, int]]:
        return encode_header(self.tensors, METADATA, self.congruent)

    @property
    def header(self) -> bytes:
        return self._encoded[0]

    @property
    def offsets(self) -> dict[str, int]:
        """Offset of each tensor's bytes in the file."""
        return self._encoded[1]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(spec.nbytes for spec in self.tensors)


def lay_out(template: Checkpoint, tensors: Sequence[TensorSpec], max_shard_size: int | None) -> tuple[Shard, ...]:
    """The shards for the output `tensors`: the template's tensors in its order."""
    layout = template.layout
    stored = {name: dtype for part in layout for name, dtype in part.dtypes.items()}
    if max_shard_size is None and layout and all(stored.get(spec.name) == spec.dtype for spec in tensors):
        return _shards_of_template(layout, tensors)
    return _pack(tensors, max_shard_size or DEFAULT_SHARD)


def _shards_of_template(layout: Sequence[Layout], tensors: Sequence[TensorSpec]) -> tuple[Shard, ...]:
    by_file: dict[str, list[TensorSpec]] = {part.file: [] for part in layout}
    homes = {name: part.file for part in layout for name in part.dtypes}
    for spec in tensors:
        by_file[homes[spec.name]].append(spec)
    starts = {part.file: part.data_start % 4096 for part in layout}
    if len(by_file) == 1:
        ((name, specs),) = by_file.items()
        return (Shard(SINGLE_FILE, tuple(specs), starts[name]),)
    return tuple(Shard(name, tuple(specs), starts[name]) for name, specs in by_file.items())


def _pack(tensors: Sequence[TensorSpec], limit: int) -> tuple[Shard, ...]:
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
        return (Shard(SINGLE_FILE, tuple(tensors)),)
    names = [f"model-{i + 1:05d}-of-{len(bins):05d}.safetensors" for i in range(len(bins))]
    return tuple(Shard(name, tuple(specs)) for name, specs in zip(names, bins, strict=True))
