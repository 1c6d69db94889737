"""The lock of an output, merge.lock.json: read it, and compare it with its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.files import read_bytes, read_json
from mergekit_lfm.store.tensors import ITEMSIZE, TensorSpec


def verify(out: Path, progress: Callable[[int], None] | None = None) -> list[str]:
    """The differences between the output folder and its lock, one line each; [] if all is as it was written.

    Re-reads every byte. progress is called with each number of bytes read. Raises FormatError without a whole lock.
    """
    files, tensors = _locked(out)
    problems = [
        f"{name} {'is missing' if not (out / name).exists() else 'was changed'}"
        for name, digest in files.items()
        if not (out / name).is_file() or xxhash.xxh3_128_hexdigest(read_bytes(out / name)) != digest
    ]
    try:
        checkpoint = open_checkpoint(out)
    except (FormatError, OSError) as error:
        return [*problems, str(error)]
    problems += [f"{name} is not in the lock" for name in checkpoint if name not in tensors]
    for name, (spec, segment, digests) in tensors.items():
        if name not in checkpoint:
            problems.append(f"{name} is missing")
        elif checkpoint[name] != spec:
            problems.append(f"found {checkpoint[name]}, the lock says {spec}")
        elif not _has_digests(checkpoint, name, digests, segment, progress or (lambda _: None)):
            problems.append(f"{name} was changed")
    return problems


def covered_files(out: Path) -> set[str]:
    """The names of all files that a folder's lock covers, and its own. Raises FormatError without a whole lock."""
    _locked(out)
    lock = lock_of(out)
    return {LOCK, *lock["files"], *(str(entry["file"]) for entry in lock["tensors"].values())}


Locked = tuple[TensorSpec, int | None, list[str]]  # a tensor, the elements of a segment if it has several, digests


def _locked(out: Path) -> tuple[dict[str, str], dict[str, Locked]]:
    """The lock's entries: the digests of the other files, and the tensors."""
    lock = lock_of(out)
    if lock.get("format") != 1:
        raise FormatError(f"{out} has no {LOCK} of format 1: it is not an output of `merge`, or of another version")
    try:
        segments = {name: int(numel) for name, numel in lock["segments"].items()}
        tensors = {
            name: (TensorSpec(name, tuple(entry["shape"]), entry["dtype"]), segments.get(name), list(entry["xxh3"]))
            for name, entry in lock["tensors"].items()
        }
        return dict(lock["files"]), tensors
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"{out / LOCK} is damaged ({error!r}): expected `files`, `segments`, and `tensors` with shape, dtype and "
            "xxh3; merge again"
        ) from None


def _has_digests(
    checkpoint: Checkpoint, name: str, digests: list[str], segment: int | None, progress: Callable[[int], None]
) -> bool:
    """True if the tensor's bytes have these digests, one for each segment of `segment` elements."""
    spec, size = checkpoint[name], ITEMSIZE[checkpoint[name].dtype]
    step = max(1, spec.nbytes if segment is None else segment * size)
    starts = range(0, max(1, spec.nbytes), step)
    if len(starts) != len(digests):
        return False
    buffer = memoryview(bytearray(min(1 << 20, spec.nbytes)))
    for start, digest in zip(starts, digests, strict=True):
        actual, end = xxhash.xxh3_128(), min(spec.nbytes, start + step)
        for at in range(start, end, len(buffer) or 1):
            data = buffer[: min(len(buffer), end - at)]
            checkpoint.read_into(name, at // size, data)
            actual.update(data)
            progress(len(data))
        if actual.hexdigest() != digest:
            return False
    return True


LOCK = "merge.lock.json"


def lock_of(folder: Path) -> dict[str, Any]:
    """The lock of a finished output, {} without a readable one."""
    try:
        lock = read_json(folder / LOCK)
    except (OSError, ValueError):
        return {}
    return lock if isinstance(lock, dict) else {}
