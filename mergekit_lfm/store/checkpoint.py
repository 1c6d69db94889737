"""A saved model as a mapping from names to tensors, read by ranges.

A checkpoint is a folder as transformers writes it, or one file. Opening it reads headers only; the data are read by
position into the caller's buffers, never mapped, so that a memory budget is a promise. Nothing is ever written to a
checkpoint. For a model on the Hub the headers are read there; its files are downloaded when their data are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.machine.resources import cache_folder, default_threads
from mergekit_lfm.store.durable import replace_file
from mergekit_lfm.store.folder import ADAPTER, weight_paths
from mergekit_lfm.store.formats import WeightFile, bytes_of, open_weight_files
from mergekit_lfm.store.hub import HubName, hub_name
from mergekit_lfm.store.identity import content_digest, state_digest
from mergekit_lfm.store.tensors import ITEMSIZE, TensorSpec, encode_header

if TYPE_CHECKING:
    import torch

    from mergekit_lfm.store.hub.snapshots import Snapshot


class Checkpoint(Mapping[str, TensorSpec]):
    """A model's tensors by name, in the order of the files and of their bytes. Raises FormatError if it is damaged."""

    def __init__(
        self,
        path: Path,
        files: Sequence[WeightFile] | None = None,
        view: Mapping[str, Any] | None = None,
        snapshot: Snapshot | None = None,
    ) -> None:
        """files: views to read in place of the folder's files; view: identifies what the views depend on besides these.

        snapshot: the model on the Hub; `path` is its folder in the cache.
        """
        self.path, self.view = path, view
        paths, weight_map = list[Path](), dict[str, str]()
        if files is None and (snapshot is not None or path.is_dir()):
            names = [file.name for file in path.iterdir()] if snapshot is None else list(snapshot.sizes)
            try:
                paths, weight_map = weight_paths(path, names, snapshot or path)
            except FormatError as error:
                if snapshot is None or snapshot.listed:
                    raise
                raise FormatError(f"{error}. HF_HUB_OFFLINE is set, so only files in the cache are used") from None
        elif files is None and path.name in ADAPTER:
            raise FormatError(f"{path} is an adapter: merge it into its model first (peft's merge_and_unload)")
        elif files is None:
            paths = [path]
        self.files = tuple(open_weight_files(paths, snapshot) if files is None else files)
        self.snapshot = snapshot or next((file.snapshot for file in self.files), None)
        self._home: dict[str, WeightFile] = {}
        for file in self.files:
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

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors)"

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.values())

    @property
    def absent(self) -> dict[str, int]:
        """The files whose data are still on the Hub, and their sizes in bytes."""
        return {file.name: file.nbytes for file in self.files if file.absent}

    def fetch(self) -> None:
        """Download the files whose data are still on the Hub. Raises as `Snapshot.fetch` does."""
        if self.snapshot is not None and self.absent:
            self.snapshot.fetch(list(self.absent))

    @property
    def resident(self) -> int:
        """Bytes that a view holds as long as it is open, besides those for reading a tensor."""
        return max((file.resident for file in self.files), default=0)

    def as_stored(self) -> Checkpoint:
        """The checkpoint as its files store it, without the changes of a view."""
        files = list(self.files)
        while any(file.inner is not None for file in files):
            files = [file.inner or file for file in files]
        return Checkpoint(self.path, files)

    def file_of(self, name: str) -> WeightFile:
        """The file that holds the tensor."""
        return self._home[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements start .. stop of the flattened tensor, as a 1-D tensor of its dtype on fresh memory."""
        import torch

        spec = self[name]
        start, stop, _ = slice(start, stop).indices(spec.numel)
        result = torch.empty(max(0, stop - start), dtype=getattr(torch, spec.dtype))
        if len(result):
            self.read_into(name, start, bytes_of(result))
        return result

    def read_into(self, name: str, start: int, into: memoryview) -> None:
        """Fill `into`, a writable view of bytes, with the tensor's data from element `start` on."""
        self._home[name].read_into(name, start * ITEMSIZE[self[name].dtype], into)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, or {} without one."""
        path = self.path / "config.json"
        if not self.path.is_dir() or not path.exists():
            return {}
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path} is not JSON ({error}); fetch it again") from None
        if not isinstance(config, dict):
            raise FormatError(f"{path}: expected an object, found a {type(config).__name__}")
        return config

    @cached_property
    def identity(self) -> list[dict[str, Any]]:
        """Data that distinguish this checkpoint without reading tensors: per file a digest of the header, size, time.

        A view adds the entries that identify it.
        """
        view = [] if self.view is None else [{"view": dict(self.view)}]
        return view + [
            {
                "file": file.path.name,
                "header_xxh3": xxhash.xxh3_128_hexdigest(
                    json.dumps([[str(spec), offset] for spec, offset in file.tensors.values()]).encode()
                ),
                "nbytes": file.nbytes,
                **file.stamp,
            }
            for file in self.files
        ]

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
        digest, nbytes = xxhash.xxh3_128(), self[name].nbytes
        buffer = memoryview(bytearray(min(1 << 20, nbytes)))
        for start in range(0, nbytes, 1 << 20):
            data = buffer[: nbytes - start]
            self._home[name].read_into(name, start, data)
            digest.update(data)
        return digest.hexdigest()

    @cached_property
    def content(self) -> str:
        """xxh3-128 of names, shapes, dtypes and data, in hex: the same for any files, sharding and order.

        A machine reads the data once: the cache keeps the digest as long as the files do not change.
        """
        states: list[Any] = [state_digest(file) for file in self.files]
        states += [] if self.view is None else [dict(self.view)]
        cached = cache_folder("contents") / xxhash.xxh3_128_hexdigest(json.dumps(states).encode())
        if "digests" not in self.__dict__:
            with suppress(OSError):
                return cached.read_text(encoding="ascii")
        digest = content_digest({self[name]: digest for name, digest in self.digests.items()})
        with suppress(OSError):  # without the file the next run reads the data again
            cached.parent.mkdir(parents=True, exist_ok=True)
            replace_file(cached, digest.encode())
        return digest


def save_tensors(
    path: Path, specs: Sequence[TensorSpec], read: Callable[[str], torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write one safetensors file atomically. read: returns a tensor by name, called for one at a time."""
    header, _ = encode_header(specs, metadata)
    parts = (bytes_of(read(spec.name).detach().cpu().contiguous()) for spec in specs)
    replace_file(path.resolve(), chain([header], parts))


def open_checkpoint(path: str | os.PathLike[str] | HubName) -> Checkpoint:
    """The checkpoint in a folder or a file, as a mapping from tensor names to `TensorSpec`; `read` gives the data.

    Text such as `org/name` or `org/name@revision` that is not a local path names a model on the Hub: its headers are
    read there, and its files are downloaded when their data are read. Raises FormatError if the checkpoint is damaged,
    FileNotFoundError if it does not exist, and otherwise as `Snapshot.fetch` does.
    """
    local = None if isinstance(path, HubName) else Path(path)
    if local is not None and local.exists():
        return Checkpoint(local)
    name = hub_name(path) if isinstance(path, str) else path
    if not isinstance(name, HubName):
        raise FileNotFoundError(f"no such checkpoint: {path}")
    from mergekit_lfm.store.hub.snapshots import find_snapshot

    try:
        snapshot = find_snapshot(name)
    except PlanError as error:
        nowhere = str(error).startswith("found no model")
        raise PlanError(f"{name} is not a local folder: {error}" if nowhere else str(error)) from None
    except ConnectionError as error:
        raise ConnectionError(f"{name} is not a local folder, and {error}") from None
    return Checkpoint(snapshot.folder, snapshot=snapshot)
