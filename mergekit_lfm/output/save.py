"""Save a folder, such as a checkpoint or a view of one: complete, or not there.

It is written as OUT.partial, which becomes OUT with one rename. A killed run leaves OUT.partial at most; the next one
starts over. A file in it marks it as ours; it lies beside it while the complete folder gets its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import xxhash

from mergekit_lfm.errors import PlanError
from mergekit_lfm.output.card import CARD
from mergekit_lfm.output.layout import Index, Shard, indexes_of, lay_out
from mergekit_lfm.output.publish import move_into_place
from mergekit_lfm.output.replace import check_folder, undo_replacement
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.durable import replace_file, reserve, sync_folder
from mergekit_lfm.store.files import name_file, read_bytes
from mergekit_lfm.store.folder import is_outside
from mergekit_lfm.store.formats import bytes_of
from mergekit_lfm.store.locks import lock_folder
from mergekit_lfm.store.places import has_files, partial_of, remove
from mergekit_lfm.store.sidecars import sidecars_of
from mergekit_lfm.store.tensors import TensorSpec, write_exactly

if TYPE_CHECKING:
    from torch import Tensor

MARK = "saving.unfinished"  # the file that marks OUT.partial as ours
COPIED_AT_ONCE = 1 << 22  # elements

Written = list[tuple[TensorSpec, str, str]]  # tensors, each with its file and the digest of its bytes
# From the contents of small files, the headers of the others and their tensors to the lock, by its name.
Locker = Callable[[Mapping[str, bytes], Mapping[str, bytes], Written], Mapping[str, bytes]]


def check_out(out: Path, inputs: Mapping[str, Path], *, overwrite: bool) -> None:
    """Raise PlanError if a folder must not be saved as `out`, or if OUT.partial holds something else."""
    partial = partial_of(out)
    if not partial.exists() and _mark_beside(partial).exists():
        _mark_beside(partial).unlink()  # of a run that was killed at its very end
    undo_replacement("", out)
    check_folder(out, inputs, overwrite=overwrite)
    if has_files(partial) and not ((partial / MARK).exists() or _mark_beside(partial).exists()):
        raise PlanError(f"{partial} exists and is not the unfinished output of an earlier run; move it away")


def _mark_beside(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.{MARK}")


def save_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    changed: Mapping[str, Tensor],
    documents: Mapping[str, bytes],
    *,
    lock: Locker | None = None,
) -> dict[str, str]:
    """Write the checkpoint's tensors, those in `changed` in place of its own, and the other files of its folder.

    Dtypes, shards and order are the checkpoint's; changed tensors have its shapes. documents: more files, by name.
    Copies the folder's files that `sidecars_of` names and its model card, but not a merge's lock, which is about other
    bytes. lock: makes one. Replaces OUT: call `check_out` first. Returns the files that were left behind, and why.
    """
    folder, tensors = checkpoint.path, Written()
    with make_folder(out) as partial:
        shards = lay_out(checkpoint, list(checkpoint.values()), None)
        for shard in shards:
            (partial / shard.name).parent.mkdir(parents=True, exist_ok=True)
            tensors += _write_shard(checkpoint, shard, changed, partial / shard.name)
        sidecars = sidecars_of(checkpoint)
        files = dict(sidecars.files)
        if folder.is_dir() and (folder / CARD).is_file() and not is_outside(folder / CARD, folder):
            files[CARD] = folder / CARD
        contents = {name: read_bytes(path) for name, path in files.items()} | dict(documents)
        contents |= {index.name: _encode_index(index) for index in indexes_of(shards)}
        if lock is not None:
            contents |= lock(contents, {shard.name: bytes(shard.header) for shard in shards}, tensors)
        for name, content in contents.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            replace_file(partial / name, content)
            sync_folder((partial / name).parent)
    return dict(sidecars.missed)


def stand_in(checkpoint: Checkpoint, folder: Path, documents: Mapping[str, bytes] = MappingProxyType({})) -> None:
    """Write a folder like the saved checkpoint: its headers and small files; the data take no space on the disk."""
    folder.mkdir()
    shards = lay_out(checkpoint, list(checkpoint.values()), None)
    files = {name: read_bytes(path) for name, path in sidecars_of(checkpoint).files} | dict(documents)
    files |= {index.name: _encode_index(index) for index in indexes_of(shards)}
    for name, content in [*files.items(), *((shard.name, bytes(shard.header)) for shard in shards)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for shard in shards:
        os.truncate(folder / shard.name, shard.nbytes)


def _encode_index(index: Index) -> bytes:
    nbytes = sum(spec.nbytes for shard in index.shards for spec in shard.tensors)
    data = {"metadata": {"total_size": nbytes}, "weight_map": index.weight_map}
    return (json.dumps(data, indent=2) + "\n").encode()


@contextmanager
def make_folder(out: Path) -> Iterator[Path]:
    """OUT.partial, empty except for its mark; it becomes OUT afterwards, or is removed after an exception.

    Replaces OUT: call `check_out` first.
    """
    partial = partial_of(out)
    partial.mkdir(parents=True, exist_ok=True)
    mark = partial / MARK
    with lock_folder(partial):
        try:
            check_out(out, {}, overwrite=True)  # others may have written there since the last look
            mark.touch()
            _mark_beside(partial).unlink(missing_ok=True)
            for path in partial.iterdir():
                if path != mark:
                    remove(path)
            yield partial
            mark.rename(_mark_beside(partial))  # complete, and still ours if this run is killed now
            move_into_place(out)
            _mark_beside(partial).unlink(missing_ok=True)
        except BaseException:
            if mark.exists():
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _write_shard(checkpoint: Checkpoint, shard: Shard, changed: Mapping[str, Tensor], path: Path) -> Written:
    """Write a shard; each of its tensors with the shard's name and the digest of its bytes."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        with name_file(path):
            reserve(fd, shard.nbytes)
            write_exactly(fd, 0, memoryview(shard.header))
            written = [
                (
                    spec,
                    shard.name,
                    _write_tensor(checkpoint, spec, changed.get(spec.name), fd, shard.offsets[spec.name]),
                )
                for spec in shard.tensors
            ]
            os.fsync(fd)
            return written
    finally:
        os.close(fd)


def _write_tensor(checkpoint: Checkpoint, spec: TensorSpec, changed: Tensor | None, fd: int, offset: int) -> str:
    """Write a tensor's bytes; returns their digest."""
    if changed is not None:
        assert (tuple(changed.shape), str(changed.dtype)) == (spec.shape, f"torch.{spec.dtype}")
        data = bytes_of(changed.contiguous())
        write_exactly(fd, offset, data)
        return xxhash.xxh3_128_hexdigest(data)
    digest = xxhash.xxh3_128()
    for start in range(0, spec.numel, COPIED_AT_ONCE):
        block = bytes_of(checkpoint.read(spec.name, start, start + COPIED_AT_ONCE))
        digest.update(block)
        write_exactly(fd, offset + start * (spec.nbytes // spec.numel), block)
    return digest.hexdigest()
