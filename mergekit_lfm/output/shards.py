"""The shards of an unfinished output, open for writing: by the driver, and by every worker for itself."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Lock

import xxhash

from mergekit_lfm.output.layout import Shard
from mergekit_lfm.store.files import name_file
from mergekit_lfm.store.tensors import TensorSpec, read_exactly, write_exactly

READ_AT_ONCE = 1 << 20  # bytes


class ShardFiles:
    """Writes tensors into the shards of a folder. Picklable: a copy in another process opens the files again."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self.folder, self.shards = folder, tuple(shards)
        self._places = {
            spec.name: (number, shard.offsets[spec.name])
            for number, shard in enumerate(shards)
            for spec in shard.tensors
        }
        self._paths = tuple(folder / shard.name for shard in self.shards)
        self._fds: dict[int, int] = {}
        self._for_reading: dict[int, int] = {}
        self._unsynced = set[int]()  # shards
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[ShardFiles], tuple[Path, tuple[Shard, ...]]]:
        return ShardFiles, (self.folder, self.shards)

    def shard_of(self, name: str) -> int:
        """The number of the tensor's shard."""
        return self._places[name][0]

    def path(self, shard: int) -> Path:
        """The path of a shard."""
        return self._paths[shard]

    def fileno(self, shard: int) -> int:
        """The descriptor to write a shard, which is opened once.

        It cannot read: NFS would widen what it writes to whole pages, over bytes that another machine writes.
        """
        return self._open(self._fds, shard, os.O_WRONLY)

    def _open(self, fds: dict[int, int], shard: int, how: int) -> int:
        with self._lock:
            if shard not in fds:
                fds[shard] = os.open(self.path(shard), how | os.O_NOFOLLOW)
            return fds[shard]

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            for fds in (self._fds, self._for_reading):
                for fd in fds.values():
                    os.close(fd)
                fds.clear()

    def sync(self) -> None:
        """Bring to the disk what was written here."""
        while self._unsynced:
            shard = self._unsynced.pop()
            with name_file(self.path(shard)):
                os.fsync(self.fileno(shard))

    def place(self, name: str) -> tuple[int, int]:
        """The descriptor of the tensor's shard, and the offset of its bytes there."""
        shard, offset = self._places[name]
        return self.fileno(shard), offset

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Write bytes of a tensor from byte `start` of it on."""
        fd, offset = self.place(name)
        self._unsynced.add(self.shard_of(name))
        with name_file(self.path(self.shard_of(name))):
            write_exactly(fd, offset + start, data)

    def write_all(self, specs: Iterable[TensorSpec], data: memoryview) -> None:
        """Write whole tensors, whose bytes lie one after another in `data`; those side by side in a shard at once."""
        runs = list[list[int]]()  # shard, offset and end there
        for spec in specs:
            shard, offset = self._places[spec.name]
            if runs and runs[-1][0] == shard and runs[-1][2] == offset:
                runs[-1][2] += spec.nbytes
            else:
                runs.append([shard, offset, offset + spec.nbytes])
        done = 0
        for shard, offset, end in runs:
            self._unsynced.add(shard)
            with name_file(self.path(shard)):
                write_exactly(self.fileno(shard), offset, data[done : done + end - offset])
            done += end - offset

    def digest(self, name: str, start: int, nbytes: int) -> str:
        """xxh3-128 of bytes of a tensor from byte `start` of it on, in hex."""
        shard, offset = self._places[name]
        fd = self._open(self._for_reading, shard, os.O_RDONLY)
        digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(READ_AT_ONCE, nbytes)))
        for at in range(start, start + nbytes, READ_AT_ONCE):
            data = buffer[: start + nbytes - at]
            read_exactly(fd, offset + at, data, self.path(self.shard_of(name)))
            digest.update(data)
        return digest.hexdigest()

    def copy(self, name: str, start: int, source: int, offset: int, nbytes: int) -> bool:
        """Copy bytes from a file's descriptor and offset to byte `start` of the tensor. False if the kernel has not.

        If source and destination are equal modulo 4096, whole pages are copied by calls of their own: a filesystem that
        has reflinks then shares them.
        """
        fd, target = self.place(name)
        self._unsynced.add(self.shard_of(name))
        target += start
        page = min(nbytes, -target % 4096) if (target - offset) % 4096 == 0 else 0
        whole = (nbytes - page) // 4096 * 4096 if page else nbytes
        done = 0
        try:
            for end in (page, page + whole, nbytes):
                while done < end:
                    moved = os.copy_file_range(source, fd, end - done, offset + done, target + done)
                    if not moved:  # the source ended early; reading it raises the error
                        return False
                    done += moved
        except OSError:  # refused or failed: plain reads and writes do without, or show which file fails
            return False
        return True


class NoFiles:
    """Takes the tensors of shards, and keeps nothing."""

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Do nothing."""

    def write_all(self, specs: Iterable[TensorSpec], data: memoryview) -> None:
        """Do nothing."""

    def copy(self, name: str, start: int, source: int, offset: int, nbytes: int) -> bool:  # noqa: ARG002
        """Do nothing."""
        return True

    def sync(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
