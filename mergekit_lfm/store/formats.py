"""One file of tensors: a byte range for each, or tensors that torch maps or holds."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.archive import Unreadable, read_archive
from mergekit_lfm.store.files import open_regular
from mergekit_lfm.store.kinds import PICKLE, ZIP, head_of, kind_of
from mergekit_lfm.store.nested import find_state_dict
from mergekit_lfm.store.state import FileState, state_of
from mergekit_lfm.store.tensors import ITEMSIZE, TensorSpec, parse_header, read_exactly, read_header

if TYPE_CHECKING:
    import torch

    from mergekit_lfm.store.ranges import RangeReader
    from mergekit_lfm.store.snapshot import Snapshot

ARCHIVES = (".bin", ".pt", ".pth", ".ckpt")  # for files that are of no known kind
_WARNINGS = Lock()  # Python's filters of warnings are the process's


class WeightFile:
    """One file of tensors that lie in it as plain byte ranges.

    address, beside: the place of the tensors in a file with more than them, and what else is there, as in `StateDict`.
    A pickled copy opens the file again, and only in the same state.
    """

    fallback = False  # True if its tensors are mapped or held in memory instead of read by position

    def __init__(
        self,
        path: Path,
        tensors: dict[str, tuple[TensorSpec, int]],
        data_start: int,
        snapshot: Snapshot | None = None,
    ) -> None:
        self.path, self.tensors, self.data_start, self.snapshot = path, tensors, data_start, snapshot
        self.address, self.beside = "", tuple[str, ...]()
        self.ranges: RangeReader | None = None  # reads its data from where it is, once that was asked for
        self._lock, self._fd = Lock(), -1
        self._state: FileState | None = None
        self._header_unchecked = snapshot is not None and not path.exists()
        if snapshot is None:
            self._state = state_of(path)
            self.nbytes = self._state.nbytes
        else:
            self.nbytes = snapshot.sizes[self.name]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_fd")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=Lock(), _fd=-1)

    @property
    def name(self) -> str:
        """Its name in the repository on the Hub, or in its folder."""
        return self.path.name if self.snapshot is None else self.path.relative_to(self.snapshot.folder).as_posix()

    @property
    def is_safetensors(self) -> bool:
        """True if it has a header with a tensor table, which is before the data."""
        return self.data_start > 0

    @property
    def absent(self) -> bool:
        """True if its data are still to be brought into the cache."""
        return self.snapshot is not None and self.ranges is None and not self.path.exists()

    @property
    def state(self) -> FileState | None:
        """Its state on the disk when it was first seen there; None while it is elsewhere."""
        if self._state is None and self.ranges is None and not self.absent:
            self._state = state_of(self.path)
        return self._state

    def fileno(self) -> int:
        """A descriptor open for reading, closed with this object. Downloads a file that is still elsewhere.

        Raises FormatError if the file changed since it was opened, or differs from its header as read there.
        """
        with self._lock:
            if self._fd < 0:
                if self.snapshot is not None:
                    self.snapshot.fetch([self.name])
                if self._header_unchecked and read_header(self.path).tensors != self.tensors:
                    raise FormatError(
                        f"{self.path}: another header was sent when the merge was planned; run the command again"
                    )
                fd = open_regular(self.path)
                found = state_of(self.path, fd)
                if found.nbytes != self.nbytes or found != self.state:
                    os.close(fd)
                    raise FormatError(f"{self.path} was changed since the merge was planned; merge again")
                self._fd = fd
                weakref.finalize(self, os.close, fd)
            return self._fd

    def offset(self, name: str) -> int | None:
        """The offset of the tensor's bytes in the file; None if they are not a range of a file that is here."""
        return self.tensors[name][1] if self.ranges is None else None

    def read_into(self, name: str, start: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from element `start` on: whole elements."""
        spec, offset = self.tensors[name]
        self._read(offset + start * ITEMSIZE[spec.dtype], into)

    def _read(self, offset: int, into: memoryview) -> None:
        if self.ranges is None:
            read_exactly(self.fileno(), offset, into, self.path)
        else:
            self.ranges.read_into(self.name, offset, into)

    def read_all_into(self, names: Iterable[str], into: memoryview) -> int:
        """Fill the first bytes of `into` with whole tensors, those side by side in the file at once; their number."""
        runs = list[list[int]]()
        stop = -1
        for name in names:
            spec, offset = self.tensors[name]
            if offset != stop:
                runs.append([offset, offset])
            runs[-1][1] = stop = offset + spec.nbytes
        done = 0
        for begin, end in runs:
            self._read(begin, into[done : done + end - begin])
            done += end - begin
        return done


class LoadedFile(WeightFile):
    """A file whose tensors are not byte ranges (strided, or saved before PyTorch 1.6): torch maps or holds it."""

    fallback = True

    def __init__(self, path: Path, snapshot: Snapshot | None = None, address: str = "") -> None:
        import torch

        found = find_state_dict(_load(path), path, torch.Tensor, address)
        tensors: dict[str, torch.Tensor] = found.tensors
        specs = {n: TensorSpec(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in tensors.items()}
        for name, tensor in tensors.items():
            if tensor.layout != torch.strided or tensor.device.type != "cpu" or specs[name].dtype not in ITEMSIZE:
                raise FormatError(
                    f"{path}: {name} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, expected a "
                    f"dense one of {', '.join(ITEMSIZE)}; convert it and save the state_dict anew"
                )
        self.held = {name: tensor.detach().resolve_conj().resolve_neg() for name, tensor in tensors.items()}
        super().__init__(path, {name: (spec, 0) for name, spec in specs.items()}, 0, snapshot)
        self.address, self.beside = found.address, found.beside

    def __reduce__(self) -> tuple[type[LoadedFile], tuple[Path, Snapshot | None, str]]:
        return LoadedFile, (self.path, self.snapshot, self.address)

    def offset(self, name: str) -> int | None:  # noqa: ARG002
        return None

    def read_into(self, name: str, start: int, into: memoryview) -> None:
        """Fill `into` with the tensor's bytes from element `start` on: whole elements."""
        import torch

        tensor = self.held[name]
        if len(into):
            _gather(tensor, start, torch.frombuffer(into, dtype=tensor.dtype))

    def read_all_into(self, names: Iterable[str], into: memoryview) -> int:
        """Fill the first bytes of `into` with whole tensors, one after another; their number."""
        done = 0
        for name in names:
            nbytes = self.tensors[name][0].nbytes
            self.read_into(name, 0, into[done : done + nbytes])
            done += nbytes
        return done


def _load(path: Path) -> Any:
    """Load a file with torch, mapped if it can be, without running pickled code, and without torch's warnings."""
    import torch

    try:
        with _WARNINGS, warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")
            if path.suffix == ".safetensors":  # torch goes by the name, but only of a path
                return torch.load(file, map_location="cpu", weights_only=True)
            try:
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError:  # files that are not zip archives cannot be mapped
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FormatError(
            f"{path}: not a checkpoint that can be loaded safely ({reason}); save its state_dict anew"
        ) from None


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
        target = into[done : done + n]
        if rows:
            target.view(rows, *tensor.shape[1:]).copy_(tensor[i : i + rows])
        else:
            _gather(tensor[i], at, target)
        done += n


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU as writable bytes."""
    import torch

    raw = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)  # type: ignore[arg-type]  # numpy's arrays are buffers


def _open_file(path: Path, snapshot: Snapshot | None, address: str) -> WeightFile:
    """Open a file on this machine."""
    if path.is_symlink() and not path.exists():
        raise FormatError(
            f"{path} is a link to {path.readlink()}, which is not there: the file was deleted, or its download did not "
            "end; download the model again"
        )
    if path.exists() and not path.is_file():
        raise FormatError(f"{path} is not a regular file, expected one with tensors; put the weights there, or a link")
    if not _is_archive(path.name, head_of(path)):
        header = read_header(path)
        if address:
            raise FormatError(f"{path}#{address}: a safetensors file has no parts with names; remove #{address}")
        return WeightFile(path, header.tensors, header.data_start, snapshot)
    try:
        found = read_archive(path, address)
    except Unreadable:
        return LoadedFile(path, snapshot, address)
    file = WeightFile(path, found.tensors, 0, snapshot)
    file.address, file.beside = found.address, found.beside
    return file


def _is_archive(name: str, head: bytes) -> bool:
    """True if a file is a zip archive or a pickle, or, where its first bytes say nothing, is named like one."""
    kind = kind_of(head)
    return kind in (ZIP, PICKLE) or (not kind and name.endswith(ARCHIVES))


def open_weight_files(paths: Sequence[Path], snapshot: Snapshot | None, address: str = "") -> list[WeightFile]:
    """Open the weight files. Reads headers on the Hub, several at a time, but downloads archives.

    address: the place of the tensors in an archive, as of `find_state_dict`.
    """
    if snapshot is None:
        return [_open_file(path, None, address) for path in paths]
    names = {path: path.relative_to(snapshot.folder).as_posix() for path in paths if not path.exists()}
    with ThreadPoolExecutor(8) as pool:
        heads = dict(zip(names, pool.map(snapshot.head, names.values()), strict=True))
        archives = [path for path, (head, _) in heads.items() if _is_archive(path.name, head)]
        snapshot.fetch([names[path] for path in archives])

        def open_file(path: Path) -> WeightFile:
            if path not in heads or path in archives:
                return _open_file(path, snapshot, address)
            header = parse_header(f"{snapshot}/{names[path]}", *heads[path])
            return WeightFile(path, header.tensors, header.data_start, snapshot)

        return list(pool.map(open_file, paths))
