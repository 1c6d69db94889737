"""Digests of a checkpoint's content, and the state that tells whether its files changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import xxhash

from mergekit_lfm.store.formats import WeightFile, bytes_of
from mergekit_lfm.store.tensors import TensorSpec

if TYPE_CHECKING:
    import torch


def state_digest(file: WeightFile) -> tuple[Any, ...]:
    """A value that changes when the file does; modification times are not enough, since users can set them."""
    if file.snapshot is not None:
        return str(file.snapshot), file.name
    status = file.path.stat()
    times = status.st_mtime_ns, status.st_ctime_ns
    return str(file.path.resolve()), status.st_dev, status.st_ino, status.st_size, *times


def identity_of(file: WeightFile) -> dict[str, Any]:
    """Data that distinguish a file without reading tensors: a digest of the header, size, and commit on the Hub."""
    header = json.dumps([[str(spec), offset] for spec, offset in file.tensors.values()])
    digest = xxhash.xxh3_128_hexdigest(header.encode())
    commit = {} if file.snapshot is None else {"commit": file.snapshot.public}
    return {"file": file.path.name, "header_xxh3": digest, "nbytes": file.nbytes, **commit}


def content_digest(digests: Mapping[TensorSpec, str]) -> str:
    """`Checkpoint.content` for tensors whose bytes have these digests."""
    entries = sorted([str(spec), digest] for spec, digest in digests.items())
    return xxhash.xxh3_128_hexdigest(json.dumps(entries).encode())


def content_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """`Checkpoint.content` for tensors in memory."""
    return content_digest(
        {
            spec_of(name, x): xxhash.xxh3_128_hexdigest(bytes_of(x.detach().cpu().contiguous()))
            for name, x in tensors.items()
        }
    )


def spec_of(name: str, x: torch.Tensor) -> TensorSpec:
    """The spec of a tensor in memory, as a checkpoint's header has it."""
    return TensorSpec(name, tuple(x.shape), str(x.dtype).removeprefix("torch."))
