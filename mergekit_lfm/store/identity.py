"""Digests that tell a checkpoint's content, or its present state, from any other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import xxhash

from mergekit_lfm.store.formats import WeightFile, bytes_of
from mergekit_lfm.store.tensors import TensorSpec

if TYPE_CHECKING:
    import torch


def _state(file: WeightFile) -> tuple[Any, ...]:
    """What changes when a file does; times that can be set at will are not enough."""
    if file.snapshot is not None:
        return str(file.snapshot), file.name
    status = file.path.stat()
    times = status.st_mtime_ns, status.st_ctime_ns
    return str(file.path.resolve()), status.st_dev, status.st_ino, status.st_size, *times


def content_digest(digests: Mapping[TensorSpec, str]) -> str:
    """What `Checkpoint.content` is for tensors whose bytes have these digests."""
    entries = sorted([str(spec), digest] for spec, digest in digests.items())
    return xxhash.xxh3_128_hexdigest(json.dumps(entries).encode())


def content_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """What `Checkpoint.content` is for tensors that lie in memory."""
    return content_digest(
        {
            spec_of(name, x): xxhash.xxh3_128_hexdigest(bytes_of(x.detach().cpu().contiguous()))
            for name, x in tensors.items()
        }
    )


def spec_of(name: str, x: torch.Tensor) -> TensorSpec:
    """What a checkpoint's header says of a tensor."""
    return TensorSpec(name, tuple(x.shape), str(x.dtype).removeprefix("torch."))
