"""A saved model as a mapping from names to tensors, read by ranges.

A checkpoint is a folder as transformers writes it, or one file. Opening it reads headers only; the data are read by
position into the caller's buffers, never mapped, so that a memory budget is a promise. Nothing is ever written to a
checkpoint. Of a model on the Hub headers are read there, and its files are downloaded when their data are.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from itertools import chain
from pathlib import Path, PurePath
from threading import Lock
from typing import TYPE_CHECKING, Any

import xxhash

from mergekit_lfm.archives import Unreadable, read_archive, state_dict
from mergekit_lfm.durable import replace_file
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.hub import HubName, hub_name
from mergekit_lfm.machine import cache_folder, default_threads
from mergekit_lfm.tensors import ITEMSIZE, TensorSpec, encode_header, parse_header, read_exactly, read_header

if TYPE_CHECKING:
    import torch

    from mergekit_lfm.hub.snapshots import Snapshot

# file names in the order of preference, as transformers has it
SINGLE = ("model.safetensors", "pytorch_model.bin")
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
ARCHIVES = (".bin", ".pt", ".pth")


class WeightFile:
    """One file of tensors that lie in it as plain byte ranges.

    stamp: what tells its present state from another one, the data unread: its time, or the commit on the Hub.
    """

    fallback = False  # whether its tensors are mapped or held in memory instead of read by position
    inner: WeightFile | None = None  # what a view reads

    def __init__(
        self,
        path: Path,
        tensors: dict[str, tuple[TensorSpec, int]],
        data_start: int,
        snapshot: Snapshot | None = None,
    ) -> None:
        self.path, self.tensors, self.data_start, self.snapshot = path, tensors, data_start, snapshot
        self._lock, self._fd = Lock(), -1
        self.stamp: dict[str, Any] = {}
        if snapshot is None:
            status = path.stat()
            self.nbytes, self.stamp = status.st_size, {"mtime_ns": status.st_mtime_ns}
        else:
            self.nbytes, self.stamp = snapshot.sizes[self.name], {"commit": str(snapshot)}

    @property
    def name(self) -> str:
        """Its name in the repository on the Hub, or in its folder."""
        return self.path.name if self.snapshot is None else self.path.relative_to(self.snapshot.folder).as_posix()

    @property
    def absent(self) -> bool:
        """Whether its data are still on the Hub."""
        return self.snapshot is not None and not self.path.exists()

    @property
    def resident(self) -> int:
        """Bytes that are held as long as it is, by all files of a checkpoint together."""
        return 0

    def fileno(self) -> int:
        """A descriptor open for reading, closed with this object. FormatError if the file is not as it was read.

        A file of the Hub is downloaded where it is not there yet.
        """
        with self._lock:
            if self._fd < 0:
                if self.snapshot is not None:
                    self.snapshot.fetch([self.name])
                fd = os.open(self.path, os.O_RDONLY)
                status = os.fstat(fd)
                if status.st_size != self.nbytes or self.stamp.get("mtime_ns") not in (None, status.st_mtime_ns):
                    os.close(fd)
                    raise FormatError(f"{self.path} was changed since the merge was planned; merge again")
                self._fd = fd
                weakref.finalize(self, os.close, fd)
            return self._fd

    def offset(self, name: str) -> int | None:
        """Where the tensor's bytes start in the file; None where they are no range of it."""
        return self.tensors[name][1]

    def scratch(self, name: str) -> int:  # noqa: ARG002
        """Bytes that reading the tensor holds in each thread, besides what it fills."""
        return 0

    def at_once(self, name: str) -> bool:  # noqa: ARG002
        """Whether all of the tensor is made when any of it is read, so that one thread should read it."""
        return False

    def read_into(self, name: str, start: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from byte `start` on."""
        read_exactly(self.fileno(), self.tensors[name][1] + start, into, self.path)


class LoadedFile(WeightFile):
    """A file whose tensors are no byte ranges (strided, or saved before PyTorch 1.6): torch maps or holds it."""

    fallback = True

    def __init__(self, path: Path, snapshot: Snapshot | None = None) -> None:
        import torch

        try:
            try:
                loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError:  # files that are no zip archives cannot be mapped
                loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FormatError(
                f"{path}: not a checkpoint that can be loaded safely ({reason}); save its state_dict anew"
            ) from None
        held: dict[str, torch.Tensor] = state_dict(loaded, path, torch.Tensor)
        specs = {n: TensorSpec(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in held.items()}
        for name, tensor in held.items():
            if tensor.layout != torch.strided or tensor.device.type != "cpu" or specs[name].dtype not in ITEMSIZE:
                raise FormatError(
                    f"{path}: {name} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, expected a "
                    f"dense one of {', '.join(ITEMSIZE)}; convert it and save the state_dict anew"
                )
        self.held = {name: tensor.detach().resolve_conj().resolve_neg() for name, tensor in held.items()}
        super().__init__(path, {name: (spec, 0) for name, spec in specs.items()}, 0, snapshot)

    def offset(self, name: str) -> int | None:  # noqa: ARG002
        return None

    def read_into(self, name: str, start: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from byte `start` on; both are whole elements."""
        import torch

        tensor = self.held[name]
        if len(into):
            _gather(tensor, start // tensor.itemsize, torch.frombuffer(into, dtype=tensor.dtype))


def _gather(tensor: torch.Tensor, start: int, into: torch.Tensor) -> None:
    """Fill `into` [n] with the flattened tensor's elements from `start` on, without a copy of the whole tensor."""
    if tensor.is_contiguous():
        into.copy_(tensor.view(-1)[start : start + len(into)])
        return
    row, done = tensor[0].numel(), 0
    while done < len(into):
        i, at = divmod(start + done, row)
        rows = 0 if at else (len(into) - done) // row
        n = rows * row or min(row - at, len(into) - done)
        part = into[done : done + n]
        if rows:
            part.view(rows, *tensor.shape[1:]).copy_(tensor[i : i + rows])
        else:
            _gather(tensor[i], at, part)
        done += n


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU as writable bytes."""
    import torch

    raw = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)  # type: ignore[arg-type]  # numpy's arrays are buffers


def _open_file(path: Path, snapshot: Snapshot | None) -> WeightFile:
    if path.suffix not in ARCHIVES:
        if snapshot is None or path.exists():
            header = read_header(path)
        else:
            name = path.relative_to(snapshot.folder).as_posix()
            header = parse_header(Path(f"{snapshot}/{name}"), *snapshot.head(name))
        return WeightFile(path, header.tensors, header.data_start, snapshot)
    if path.stat().st_size < 512:
        head = path.read_bytes()
        if head.startswith(b"version https://git-lfs"):
            raise FormatError(
                f"{path}: this is a git-lfs pointer, not the weights; run `git lfs pull` in its repository"
            )
    try:
        return WeightFile(path, read_archive(path), 0, snapshot)
    except Unreadable:
        return LoadedFile(path, snapshot)


def _open_files(paths: Sequence[Path], snapshot: Snapshot | None) -> list[WeightFile]:
    """The weight files. Those on the Hub are asked for their headers, several at a time; a .bin is downloaded first."""
    if snapshot is None:
        return [_open_file(path, None) for path in paths]
    names = [path.relative_to(snapshot.folder).as_posix() for path in paths if path.suffix in ARCHIVES]
    snapshot.fetch(names)
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda path: _open_file(path, snapshot), paths))


def leads_away(name: object) -> bool:
    """Whether what a file says is the name of another, below its folder, is none or leads out of there."""
    return not isinstance(name, str) or not name or PurePath(name).is_absolute() or ".." in PurePath(name).parts


def _weight_paths(folder: Path, names: Collection[str], label: object) -> tuple[list[Path], dict[str, str]]:
    """The weight files of a folder that has these files, and the index's map from tensors to files, {} without one."""
    singles = [folder / name for name in SINGLE if name in names]
    indexes = [folder / name for name in INDEX if name in names]
    safe = [path for path in (*singles, *indexes) if ".safetensors" in path.name]
    chosen = safe or [*singles, *indexes]
    if len(chosen) > 1:
        both = " and ".join(path.name for path in chosen)
        raise FormatError(f"{label} has both {both}: one of them is left from an earlier save; remove it")
    if not chosen:
        if any(name in names for name in ADAPTER):
            raise FormatError(
                f"{label} holds an adapter and no model: merge it into its model first (peft's merge_and_unload)"
            )
        others = sorted(folder / name for name in names if name.endswith(".safetensors") and "/" not in name)
        if len(others) != 1:
            found = f"{len(others)} other .safetensors files" if others else "no .safetensors files"
            raise FormatError(f"{label} holds no model: expected {', '.join((*SINGLE, *INDEX))}, found {found}")
        chosen = others
    if chosen[0].suffix != ".json":
        return chosen, {}
    try:
        weight_map = json.loads(chosen[0].read_text(encoding="utf-8"))["weight_map"]
        paths = [folder / str(name) for name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FormatError(
            f"{label}/{chosen[0].name}: expected JSON with a weight_map from tensors to files; fetch it again"
        ) from None
    if away := next((name for name in weight_map.values() if leads_away(name)), None):
        raise FormatError(f"{label}/{chosen[0].name}: {away!r} is no file of that folder; fetch the index again")
    missing = sorted({*weight_map.values()} - {*names})
    if label == folder:  # of a folder, `names` has no files of folders in it
        missing = [name for name in missing if not (folder / name).exists()]
    if missing:
        raise FormatError(f"{label}: shards named in {chosen[0].name} are missing: {', '.join(missing)}; fetch them")
    return paths, weight_map


class Checkpoint(Mapping[str, TensorSpec]):
    """A model's tensors by name, in the order of the files and of their bytes.

    Raises FormatError where it is damaged.
    """

    def __init__(
        self,
        path: Path,
        files: Sequence[WeightFile] | None = None,
        view: Mapping[str, Any] | None = None,
        snapshot: Snapshot | None = None,
    ) -> None:
        """files: views of the folder's files, to be read in their place; view: what they depend on besides these.

        snapshot: the model on the Hub whose folder in the cache `path` is.
        """
        self.path, self.view = path, view
        paths, weight_map = list[Path](), dict[str, str]()
        if files is None and (snapshot is not None or path.is_dir()):
            names = [file.name for file in path.iterdir()] if snapshot is None else list(snapshot.sizes)
            try:
                paths, weight_map = _weight_paths(path, names, snapshot or path)
            except FormatError as error:
                if snapshot is None or snapshot.listed:
                    raise
                raise FormatError(f"{error}. HF_HUB_OFFLINE is set, so only what is in the cache counts") from None
        elif files is None and path.name in ADAPTER:
            raise FormatError(f"{path} is an adapter: merge it into its model first (peft's merge_and_unload)")
        elif files is None:
            paths = [path]
        self.files = tuple(_open_files(paths, snapshot) if files is None else files)
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
        """Bytes that a view holds as long as it is open, besides what reading a tensor takes."""
        return max((file.resident for file in self.files), default=0)

    def as_stored(self) -> Checkpoint:
        """The checkpoint without what a view of it changes."""
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
        """config.json, or {} where there is none."""
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
        """What tells this checkpoint from another, the data unread: per file a digest of the header, size, time.

        Of a view also what it depends on besides.
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
        found, nbytes = xxhash.xxh3_128(), self[name].nbytes
        buffer = memoryview(bytearray(min(1 << 20, nbytes)))
        for start in range(0, nbytes, 1 << 20):
            part = buffer[: nbytes - start]
            self._home[name].read_into(name, start, part)
            found.update(part)
        return found.hexdigest()

    @cached_property
    def content(self) -> str:
        """xxh3-128 of names, shapes, dtypes and data, in hex: the same for any files, sharding and order.

        The data are read once on a machine: what was found is kept for these very files, as they are.
        """
        states: list[Any] = [_state(file) for file in self.files]
        states += [] if self.view is None else [dict(self.view)]
        kept = cache_folder("contents") / xxhash.xxh3_128_hexdigest(json.dumps(states).encode())
        if "digests" not in self.__dict__:
            with suppress(OSError):
                return kept.read_text(encoding="ascii")
        found = content_digest({self[name]: digest for name, digest in self.digests.items()})
        with suppress(OSError):  # without it the next run reads the data again
            kept.parent.mkdir(parents=True, exist_ok=True)
            replace_file(kept, found.encode())
        return found


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


def save_tensors(
    path: Path, specs: Sequence[TensorSpec], read: Callable[[str], torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write one safetensors file, at once. read: a tensor by name, asked for one at a time."""
    header, _ = encode_header(specs, metadata)
    parts = (bytes_of(read(spec.name).detach().cpu().contiguous()) for spec in specs)
    replace_file(path.resolve(), chain([header], parts))


def open_checkpoint(path: str | os.PathLike[str] | HubName) -> Checkpoint:
    """The checkpoint in a folder or a file, as a mapping from tensor names to `TensorSpec`; `read` gives the data.

    Text such as `org/name` or `org/name@revision` that is no path here is a model on the Hub: headers are read there,
    and its files are downloaded when their data are. Raises FormatError where the checkpoint is damaged,
    FileNotFoundError where it is not there, and as `Snapshot.fetch` does.
    """
    place = None if isinstance(path, HubName) else Path(path)
    if place is not None and place.exists():
        return Checkpoint(place)
    name = hub_name(path) if isinstance(path, str) else path
    if not isinstance(name, HubName):
        raise FileNotFoundError(f"no such checkpoint: {path}")
    from mergekit_lfm.hub.snapshots import find_snapshot

    try:
        snapshot = find_snapshot(name)
    except PlanError as error:
        nowhere = str(error).startswith("found no model")
        raise PlanError(f"{name} is no folder here: {error}" if nowhere else str(error)) from None
    except ConnectionError as error:
        raise ConnectionError(f"{name} is no folder here, and {error}") from None
    return Checkpoint(snapshot.folder, snapshot=snapshot)
