"""A saved model as a mapping from names to tensors, read by ranges.

`Checkpoint` is the interface; `StoredCheckpoint` is a folder as transformers writes it, or one file. Opening it reads
headers only; the data are read by position into the caller's buffers, never mapped, so that a memory budget is a
promise. Nothing is ever written to a checkpoint. For a model on the Hub the headers are read there; its files are
downloaded when their data are read.
"""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import xxhash

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.machine.resources import cache_folder, default_threads
from mergekit_lfm.store.durable import replace_file
from mergekit_lfm.store.folder import ADAPTER, read_config, weight_paths
from mergekit_lfm.store.formats import WeightFile, bytes_of, open_weight_files
from mergekit_lfm.store.hub import HubName, hub_name, nearest_name
from mergekit_lfm.store.identity import content_digest, identity_of, state_digest
from mergekit_lfm.store.tensors import ITEMSIZE, TensorSpec

if TYPE_CHECKING:
    import torch

    from mergekit_lfm.store.hub.snapshots import Snapshot


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of reading any range of a tensor.

    scratch: bytes in each thread, besides the buffer that is filled. at_once: True if reading any of the tensor makes
    all of it, so that one thread should read it.
    """

    scratch: int = 0
    at_once: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """A file of a checkpoint: the start of its data, and the dtype in which it stores each tensor, by name."""

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
        """Data that distinguish this checkpoint without reading tensors: per file a digest of the header, size, time.

        A view adds the entries that identify it.
        """

    @property
    @abstractmethod
    def states(self) -> list[Any]:
        """Data that change whenever the content may have changed, without reading tensors."""

    @property
    @abstractmethod
    def layout(self) -> tuple[Layout, ...]:
        """The safetensors files that hold the tensors; () if they lie otherwise."""

    @property
    def dropped(self) -> dict[str, str]:
        """The tensors in the files that it leaves out on purpose, by their names there, and why."""
        return {}

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
        """The files whose data are still on the Hub, and their sizes in bytes."""
        return {file.name: file.nbytes for file in self.files if file.absent}

    def fetch(self) -> None:
        """Download the files whose data are still on the Hub. Raises as `Snapshot.fetch` does."""
        if self.snapshot is not None and self.absent:
            self.snapshot.fetch(list(self.absent))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements start .. stop of the flattened tensor, as a 1-D tensor of its dtype on fresh memory."""
        import torch

        spec = self[name]
        start, stop, _ = slice(start, stop).indices(spec.numel)
        result = torch.empty(max(0, stop - start), dtype=getattr(torch, spec.dtype))
        if len(result):
            self.read_into(name, start, bytes_of(result))
        return result

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

    def __init__(self, path: Path, snapshot: Snapshot | None = None) -> None:
        """snapshot: the model on the Hub; `path` is its folder in the cache."""
        self.path = path
        paths, weight_map = [path], dict[str, str]()
        if snapshot is not None or path.is_dir():
            names = [file.name for file in path.iterdir()] if snapshot is None else list(snapshot.sizes)
            try:
                paths, weight_map = weight_paths(path, names, snapshot or path)
            except FormatError as error:
                if snapshot is None or snapshot.listed:
                    raise
                from mergekit_lfm.store.hub.client import offline_variable

                variable = offline_variable()
                raise FormatError(f"{error}. {variable} is set, so only files in the cache are used") from None
        elif path.name in ADAPTER:
            raise FormatError(f"{path} is an adapter: merge it into its model first (peft's merge_and_unload)")
        self._files = tuple(open_weight_files(paths, snapshot))
        self._home: dict[str, WeightFile] = {}
        for file in self._files:
            for name in file.tensors:
                if name in self._home:
                    raise FormatError(f"{path}: {name} is in {self._home[name].path.name} and in {file.path.name}")
                self._home[name] = file
        absent = [name for name in weight_map if name not in self._home]
        if absent:
            more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
            raise FormatError(f"{path}: the index names tensors that no shard holds: {', '.join(absent[:3])}{more}")

    def __getitem__(self, name: str) -> TensorSpec:
        return self._home[name].tensors[name][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    @property
    def files(self) -> tuple[WeightFile, ...]:
        return self._files

    def read_into(self, name: str, start: int, into: memoryview) -> None:
        self._home[name].read_into(name, start, into)

    def location(self, name: str) -> tuple[int, int] | None:
        file = self._home[name]
        offset = file.offset(name)
        return None if offset is None else (file.fileno(), offset)

    def cost(self, name: str) -> Cost:  # noqa: ARG002
        return Cost()

    @property
    def resident(self) -> int:
        return 0

    @cached_property
    def identity(self) -> list[dict[str, Any]]:
        return [identity_of(file) for file in self._files]

    @property
    def states(self) -> list[Any]:
        return [state_digest(file) for file in self._files]

    @property
    def layout(self) -> tuple[Layout, ...]:
        if not all(file.path.suffix == ".safetensors" for file in self._files):
            return ()
        return tuple(
            Layout(file.path.name, file.data_start, {name: spec.dtype for name, (spec, _) in file.tensors.items()})
            for file in self._files
        )


def open_checkpoint(path: str | os.PathLike[str] | HubName) -> Checkpoint:
    """The checkpoint in a folder or a file, as a mapping from tensor names to `TensorSpec`; `read` gives the data.

    Text such as `org/name` or `org/name@revision` that is not a local path names a model on the Hub: its headers are
    read there, and its files are downloaded when their data are read. Raises FormatError if the checkpoint is damaged,
    FileNotFoundError if it does not exist, and otherwise as `Snapshot.fetch` does.
    """
    local = None if isinstance(path, HubName) else Path(path)
    if local is not None and local.exists():
        return StoredCheckpoint(local)
    name = hub_name(path) if isinstance(path, str) else path
    if not isinstance(name, HubName):
        raise FileNotFoundError(f"no such checkpoint: {path}{nearest_name(str(path))}")
    from mergekit_lfm.store.hub.snapshots import find_snapshot

    try:
        snapshot = find_snapshot(name)
    except PlanError as error:
        nowhere = str(error).startswith("found no model")
        raise PlanError(f"{name} is not a local folder: {error}" if nowhere else str(error)) from None
    except ConnectionError as error:
        raise ConnectionError(f"{name} is not a local folder, and {error}") from None
    return StoredCheckpoint(snapshot.folder, snapshot)
