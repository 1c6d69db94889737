"""A saved model as a mapping from names to tensors, read by ranges.

`Checkpoint` is the interface; `StoredCheckpoint` is a folder as transformers writes it, or one file. Opening it reads
headers only; the data are read by position into the caller's buffers, never mapped, so that a memory budget is a
promise. Nothing is ever written to a checkpoint. For a model on the Hub or in a bucket the headers are read there; its
files are downloaded when their data are read, or read by ranges.
"""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import ItemsView, Iterator, Mapping, Sequence, ValuesView
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import xxhash

from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.machine.resources import cache_folder, default_threads
from mergekit_lfm.store.durable import replace_file
from mergekit_lfm.store.elsewhere import Elsewhere, find_elsewhere, name_elsewhere, nearest
from mergekit_lfm.store.folder import read_config, split_address
from mergekit_lfm.store.formats import WeightFile, bytes_of
from mergekit_lfm.store.identity import content_digest, identity_of, state_digest
from mergekit_lfm.store.tensors import ITEMSIZE, TensorSpec
from mergekit_lfm.store.weights import open_adapter_weights, open_weights

if TYPE_CHECKING:
    import torch

    from mergekit_lfm.store.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of reading any range of a tensor.

    scratch: bytes in each thread, besides the buffer that is filled. at_once: True if reading any of the tensor makes
    all of it, so that one thread should read it.
    """

    scratch: int = 0
    at_once: bool = False


FREE = Cost()


@dataclass(frozen=True, slots=True)
class Layout:
    """A file of a checkpoint, and the dtype in which it stores each tensor, by name.

    file: its name; before it the folder of its module, if it is of one. data_start: where a safetensors file's data
    start, 0 for any other.
    """

    file: str
    data_start: int
    dtypes: Mapping[str, str]


class Checkpoint(Mapping[str, TensorSpec]):
    """A model's tensors by name, in the order of the files and of their bytes.

    path: the folder of its config and of the other files beside the weights; or its only file.
    """

    path: Path

    @property
    @abstractmethod
    def files(self) -> tuple[WeightFile, ...]:
        """The files on disk or on the Hub that it is read from."""

    @abstractmethod
    def read_into(self, name: str, start: int, into: memoryview) -> None:
        """Fill `into`, a writable view of bytes, with the tensor's data from element `start` on: whole elements."""

    def read_all_into(self, names: Sequence[str], into: memoryview) -> None:
        """Fill `into`, a writable view of bytes, with the data of several tensors, one after another."""
        done = 0
        for name in names:
            nbytes = self[name].nbytes
            self.read_into(name, 0, into[done : done + nbytes])
            done += nbytes

    @abstractmethod
    def location(self, name: str) -> tuple[int, int] | None:
        """A descriptor open for reading, and the offset of the tensor's bytes there; None if they are in no file."""

    @abstractmethod
    def cost(self, name: str) -> Cost:
        """The cost of reading the tensor."""

    @property
    @abstractmethod
    def resident(self) -> int:
        """Bytes that it holds as long as it is open, besides those for reading a tensor."""

    @property
    @abstractmethod
    def identity(self) -> list[dict[str, Any]]:
        """Data that distinguish this checkpoint without reading tensors: per file a digest of the header, size, commit.

        A view adds the entries that identify it.
        """

    @property
    @abstractmethod
    def states(self) -> list[Any]:
        """Data that change whenever the content may have changed, without reading tensors."""

    @property
    @abstractmethod
    def layout(self) -> tuple[Layout, ...]:
        """The files that hold the tensors; () if they are of several checkpoints."""

    @property
    def dropped(self) -> dict[str, str]:
        """The tensors in the files that it leaves out on purpose, by their names there, and why."""
        return {}

    def stored_dtype(self, name: str) -> str:
        """The dtype of the tensor in the files, where it is read in a wider one only to be rounded once."""
        return self[name].dtype

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that it is read from, and files without one."""
        return (self.path,)

    def name_in_files(self, name: str) -> str:
        """The name of the tensor in the files."""
        return name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {len(self)} tensors)"

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.values())

    @property
    def snapshot(self) -> Snapshot | None:
        """The model on the Hub that it is read from."""
        return next((file.snapshot for file in self.files), None)

    @property
    def absent(self) -> dict[str, int]:
        """The files whose data are still to be brought into the cache, and their sizes in bytes."""
        return {file.name: file.nbytes for file in self.files if file.absent}

    def fetch(self, progress: Progress = SILENCE) -> None:
        """Bring the files into the cache whose data are elsewhere. Raises as `Snapshot.fetch` does."""
        if self.snapshot is not None and self.absent:
            self.snapshot.fetch(list(self.absent), progress)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements start .. stop of the flattened tensor, as a 1-D tensor of its dtype on fresh memory."""
        import torch

        spec = self[name]
        start, stop, _ = slice(start, stop).indices(spec.numel)
        result = torch.empty(max(0, stop - start), dtype=getattr(torch, spec.dtype))
        if len(result):
            self.read_into(name, start, bytes_of(result))
        return result

    def stream(self, most: int, readers: int) -> None:
        """Read files that are elsewhere by ranges from now on, instead of bringing them into the cache.

        most: bytes of them to keep at a time, with those that are read ahead. readers: threads that read.
        """
        absent = [file for file in self.files if file.absent]
        if absent and self.snapshot is not None:
            from mergekit_lfm.store.ranges import RangeReader

            reader = RangeReader(self.snapshot, [file.name for file in absent], most, readers)
            for file in absent:
                file.ranges = reader

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, or {} without one."""
        return read_config(self.path)

    @cached_property
    def digest(self) -> str:
        """xxh3-128 of the identity, in hex."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self.identity, sort_keys=True).encode())

    @cached_property
    def digests(self) -> dict[str, str]:
        """xxh3-128 of every tensor's bytes, in hex. Reads all of the data, once."""
        self.fetch()
        with ThreadPoolExecutor(default_threads()) as pool:
            return dict(zip(self, pool.map(self.digest_of, self), strict=True))

    def digest_of(self, name: str) -> str:
        """xxh3-128 of one tensor's bytes, in hex."""
        digest, nbytes, size = xxhash.xxh3_128(), self[name].nbytes, ITEMSIZE[self[name].dtype]
        buffer = memoryview(bytearray(min(1 << 20, nbytes)))
        for start in range(0, nbytes, 1 << 20):
            data = buffer[: nbytes - start]
            self.read_into(name, start // size, data)
            digest.update(data)
        return digest.hexdigest()

    @cached_property
    def content(self) -> str:
        """xxh3-128 of names, shapes, dtypes and data, in hex: the same for any files, sharding and order.

        A machine reads the data once: the cache keeps the digest as long as the files do not change.
        """
        cached = cache_folder("contents") / xxhash.xxh3_128_hexdigest(json.dumps(self.states).encode())
        if "digests" not in self.__dict__:
            with suppress(OSError):
                return cached.read_text(encoding="ascii")
        digest = content_digest({self[name]: digest for name, digest in self.digests.items()})
        with suppress(OSError):  # without the file the next run reads the data again
            cached.parent.mkdir(parents=True, exist_ok=True)
            replace_file(cached, digest.encode())
        return digest


@final
class StoredCheckpoint(Checkpoint):
    """A checkpoint as its files hold it. Raises FormatError if it is damaged."""

    def __init__(
        self, path: Path, snapshot: Snapshot | None = None, address: str = "", *, adapter: bool = False
    ) -> None:
        """snapshot: the model on the Hub; `path` is its folder in the cache. address: of the tensors in a file.

        adapter: to open the adapter in the folder, not the model.
        """
        self.path = path
        self._opened = open_adapter_weights(path, snapshot) if adapter else open_weights(path, snapshot, address)
        self._specs, self._places = self._opened.specs, self._opened.places

    def __getitem__(self, name: str) -> TensorSpec:
        return self._specs[name]

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def items(self) -> ItemsView[str, TensorSpec]:
        return self._specs.items()

    def values(self) -> ValuesView[TensorSpec]:
        return self._specs.values()

    @property
    def dropped(self) -> dict[str, str]:
        return self._opened.dropped

    @property
    def files(self) -> tuple[WeightFile, ...]:
        return tuple(file for file, _ in self._opened.files)

    def read_into(self, name: str, start: int, into: memoryview) -> None:
        file, own = self._places[name]
        file.read_into(own, start, into)

    def read_all_into(self, names: Sequence[str], into: memoryview) -> None:
        done = 0
        for file, places in groupby(map(self._places.__getitem__, names), itemgetter(0)):
            done += file.read_all_into((own for _, own in places), into[done:])

    def location(self, name: str) -> tuple[int, int] | None:
        file, own = self._places[name]
        offset = file.offset(own)
        return None if offset is None else (file.fileno(), offset)

    def cost(self, name: str) -> Cost:  # noqa: ARG002
        return FREE

    @property
    def resident(self) -> int:
        return sum(reader.resident for reader in {file.ranges for file in self.files} if reader is not None)

    @cached_property
    def identity(self) -> list[dict[str, Any]]:
        return [identity_of(file) for file in self.files]

    @property
    def states(self) -> list[Any]:
        return [(*state_digest(file), *([file.address] if file.address else [])) for file in self.files]

    @property
    def layout(self) -> tuple[Layout, ...]:
        dtypes: dict[WeightFile, dict[str, str]] = {file: {} for file in self.files}
        for name, (file, _) in self._places.items():
            dtypes[file][name] = self._specs[name].dtype
        return tuple(
            Layout(f"{module}/{file.path.name}".lstrip("/"), file.data_start, dtypes[file])
            for file, module in self._opened.files
        )


def open_checkpoint(path: str | os.PathLike[str] | Elsewhere, *, adapter: bool = False) -> Checkpoint:
    """The checkpoint in a folder or a file, as a mapping from tensor names to `TensorSpec`; `read` gives the data.

    FILE#KEY.KEY names the state dict under these keys of a PyTorch file. Text such as `org/name` or `org/name@revision`
    that is not a local path names a model on the Hub, an address as `s3://bucket/path` one in a bucket: its headers are
    read there, and its files are downloaded when their data are read. adapter: to open the adapter in a folder, in
    place of a model. Raises FormatError if the checkpoint is damaged, FileNotFoundError if it does not exist, and
    otherwise as `Snapshot.fetch` does.
    """
    local = None if isinstance(path, Elsewhere) else Path(path)
    if local is not None and local.exists():
        return StoredCheckpoint(local, adapter=adapter)
    if local is not None and (parts := split_address(local)):
        return StoredCheckpoint(parts[0], address=parts[1])
    name = name_elsewhere(path) if isinstance(path, str) else path
    if not isinstance(name, Elsewhere):
        raise FileNotFoundError(f"no such checkpoint: {path}{nearest(str(path))}")
    snapshot = find_elsewhere(name)
    return StoredCheckpoint(snapshot.folder, snapshot, adapter=adapter)
