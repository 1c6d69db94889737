"""The lock of an output, merge.lock.json or an adapter's adapter.lock.json: read it, compare it with its folder."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.durable import replace_file
from mergekit_lfm.store.files import open_file, read_bytes, read_json
from mergekit_lfm.store.folder import leads_away
from mergekit_lfm.store.tensors import ITEMSIZE, MAX_HEADER, TensorSpec

LOCK = "merge.lock.json"
ADAPTER_LOCK = "adapter.lock.json"
LOCKS = (LOCK, ADAPTER_LOCK)
FORMAT = 3
OWN_DIGEST = "digest"  # the lock's entry with a digest of all others
COMMON = "common"  # the lock's entry with what its tensors have in common
INPUTS_NOT_COVERED = "the inputs, which are not read again"
NOT_COVERED = ("hidden files", "a lock that was made anew: it has a digest of itself, but no signature")


@dataclass(frozen=True, slots=True)
class LockedTensor:
    """A tensor in a lock, and its shard. digests: one for each segment of `segment` elements, None for a single one.

    inputs: one digest for each tensor that it was made from; () for a copy.
    """

    spec: TensorSpec
    file: str
    segment: int | None
    digests: tuple[str, ...]
    inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock's digests of its plan, of itself, of the shards' headers and of all other files, and its tensors.

    name: of its own file. intact: False if the lock is not as it was written.
    """

    name: str
    plan: str
    digest: str
    files: Mapping[str, str]
    headers: Mapping[str, str]
    tensors: Mapping[str, LockedTensor]
    intact: bool

    @property
    def names(self) -> set[str]:
        """The names of all files that it covers, and its own."""
        return {self.name, *self.files, *self.headers, *(tensor.file for tensor in self.tensors.values())}


def verify(out: Path, progress: Callable[[int], None] | None = None, *, alone: bool = True) -> list[str]:
    """The differences between the output folder and its lock, one line each; [] if all is as it was written.

    Re-reads every byte. progress is called with each number of bytes read. alone: whether files that the lock does not
    name are differences, too. Raises FormatError without a whole lock.
    """
    lock = read_lock(out)
    problems = [*compare_files(out, lock, alone)]
    try:
        checkpoint = open_checkpoint(out, adapter=lock.name == ADAPTER_LOCK)
    except (FormatError, OSError) as error:
        return [*problems, str(error)]
    homes = {name: part.file for part in checkpoint.layout for name in part.dtypes}
    problems += [f"{name} is not in the lock" for name in checkpoint if name not in lock.tensors]
    for name, tensor in lock.tensors.items():
        if name not in checkpoint:
            problems.append(f"{name} is missing")
        elif checkpoint[name] != tensor.spec:
            problems.append(f"found {checkpoint[name]}, the lock says {tensor.spec}")
        elif homes.get(name) != tensor.file:
            problems.append(f"{name} is in {homes.get(name)}, the lock says {tensor.file}")
        elif not _has_digests(checkpoint, name, tensor, progress or (lambda _: None)):
            problems.append(f"{name} was changed")
    return problems


def compare_files(out: Path, lock: Lock, alone: bool) -> Iterator[str]:
    """The differences of all but the tensors: of the lock itself, headers, links, and files that it does not name."""
    yield from (f"{name} is missing" for name in lock.files if not (out / name).is_file())
    for name, digest in lock.files.items():
        if (out / name).is_file() and xxhash.xxh3_128_hexdigest(read_bytes(out / name)) != digest:
            yield f"{name} was changed"
    if not lock.intact:
        yield f"{lock.name} was changed"
    for name in sorted(lock.names):
        if is_link(out, name):
            yield f"{name} is a link to {(out / name).readlink()}"
    for name, digest in lock.headers.items():
        if not (out / name).is_file():
            yield f"{name} is missing"
        elif _header_digest(out / name) != digest:
            yield f"the header of {name} was changed: names, shapes, order or metadata"
    others = (path.relative_to(out) for path in sorted(out.rglob("*")) if path.is_symlink() or not path.is_dir())
    for path in others if alone else ():
        if path.as_posix() not in lock.names and not any(part.startswith(".") for part in path.parts):
            yield f"{path} is not in the lock"


def is_link(out: Path, name: str) -> bool:
    """True if a file of an output is a link; those of the Hub's cache, where all files are links, do not count."""
    path, home = out.resolve() / name, out.resolve().parent
    if not path.is_symlink():
        return False
    target = os.path.normpath(path.parent / path.readlink())  # which may be a link itself, to xet's cache
    return home.name != "snapshots" or Path(target).parent != home.parent / "blobs"


def _header_digest(path: Path) -> str:
    """xxh3-128 of a safetensors file's header, with its length."""
    with open_file(path) as file:
        length = file.read(8)
        return xxhash.xxh3_128_hexdigest(length + file.read(min(MAX_HEADER, int.from_bytes(length, "little"))))


def covered_files(out: Path) -> set[str]:
    """The names of all files that a folder's lock covers, and its own. Raises FormatError without a whole lock."""
    return read_lock(out).names


def read_lock(out: Path) -> Lock:
    """The lock of an output folder. Raises FormatError without a whole one."""
    name = lock_name(out) or LOCK
    lock = lock_of(out, name)
    if lock.get("format") != FORMAT:
        raise FormatError(
            f"{out} has no {name} of format {FORMAT}: it is not an output of `merge`, or of another version"
        )
    try:
        segments = {name: int(numel) for name, numel in lock["segments"].items()}
        tensors = {
            tensor: LockedTensor(
                TensorSpec(tensor, tuple(entry["shape"]), entry["dtype"]),
                str(entry["file"]),
                segments.get(tensor),
                tuple(entry["xxh3"]),
                tuple(entry.get("inputs", ())),
            )
            for tensor, own in lock["tensors"].items()
            for entry in ({**lock.get(COMMON, {}), **own},)
        }
        headers = {name: str(digest) for name, digest in lock["headers"].items()}
        plan, digest = str(lock["plan"]), str(lock[OWN_DIGEST])
        found = Lock(name, plan, digest, dict(lock["files"]), headers, tensors, is_intact(lock))
        for file in found.names:
            if leads_away(file):
                raise ValueError(f"{file:.60} names no file of the folder")
        return found
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"{out / name} is damaged ({error!r}): expected `plan`, `digest`, `files`, `headers`, `segments`, and "
            "`tensors` with shape, dtype, file and xxh3; merge again"
        ) from None


def encode_lock(lock: Mapping[str, Any]) -> tuple[bytes, str]:
    """The lock's bytes, and the digest in it: what most tensors share stands once, under `common`; each has a line.

    lock: its entries; `tensors` with all keys of each.
    """
    tensors = lock["tensors"]
    counts = {key: Counter(str(entry[key]) for entry in tensors.values()) for key in ("method", "dtype", "file")}
    common = {key: count.most_common(1)[0][0] for key, count in counts.items() if count}
    short = {
        name: {key: value for key, value in entry.items() if common.get(key) != value}
        for name, entry in tensors.items()
    }
    facts = {key: value for key, value in lock.items() if key not in ("tensors", OWN_DIGEST)} | {COMMON: common}
    facts[OWN_DIGEST] = own_digest({**facts, "tensors": short})
    head = json.dumps(facts, indent=1, ensure_ascii=False)
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    lines = ",".join(f"\n  {encode({name: entry})[1:-1]}" for name, entry in short.items())
    return (head.removesuffix("\n}") + f',\n "tensors": {{{lines}\n }}\n}}\n').encode(), facts[OWN_DIGEST]


def is_intact(lock: Mapping[str, Any]) -> bool:
    """True if the lock's entries have its digest."""
    return lock.get(OWN_DIGEST) == own_digest(lock)


def own_digest(lock: Mapping[str, Any]) -> str:
    """xxh3-128 of all of a lock's entries but its digest, as JSON: the same for any order of keys and any spaces."""
    rest = {key: value for key, value in lock.items() if key != OWN_DIGEST}
    return xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def _has_digests(checkpoint: Checkpoint, name: str, tensor: LockedTensor, progress: Callable[[int], None]) -> bool:
    """True if the tensor's bytes have the digests in the lock."""
    spec, size = checkpoint[name], ITEMSIZE[checkpoint[name].dtype]
    step = max(1, spec.nbytes if tensor.segment is None else tensor.segment * size)
    starts = range(0, max(1, spec.nbytes), step)
    if len(starts) != len(tensor.digests):
        return False
    buffer = memoryview(bytearray(min(1 << 20, spec.nbytes)))
    for start, digest in zip(starts, tensor.digests, strict=True):
        actual, end = xxhash.xxh3_128(), min(spec.nbytes, start + step)
        for at in range(start, end, len(buffer) or 1):
            data = buffer[: min(len(buffer), end - at)]
            checkpoint.read_into(name, at // size, data)
            actual.update(data)
            progress(len(data))
        if actual.hexdigest() != digest:
            return False
    return True


def revise(folder: Path, name: str, data: bytes) -> None:
    """Replace a file of a finished output that its lock covers, and then its digest in the lock."""
    lock = lock_of(folder)
    tensors = {key: {**lock.get(COMMON, {}), **entry} for key, entry in lock["tensors"].items()}
    files = {**lock["files"], name: xxhash.xxh3_128_hexdigest(data)}
    replace_file(folder / name, data)
    replace_file(folder / LOCK, encode_lock({**lock, "files": files, "tensors": tensors})[0])


def lock_name(folder: Path) -> str | None:
    """The name of the lock in a finished output, of a merge or of an adapter; None without a whole one."""
    return next((name for name in LOCKS if lock_of(folder, name)), None)


def lock_of(folder: Path, name: str = LOCK) -> dict[str, Any]:
    """The lock of a finished output, {} without a whole one."""
    try:
        lock = read_json(folder / name)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return lock if isinstance(lock, dict) else {}
