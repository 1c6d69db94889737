"""PyTorch's zip archives as tables of tensors with file offsets, without torch or pickled code.

`torch.save` stores every storage uncompressed, so a contiguous tensor is a byte range as in safetensors. Archives that
it does not write, such as compressed ones, are refused: torch maps their bytes as if they were plain.
"""

from __future__ import annotations

import errno
import io
import os
import struct
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, BinaryIO

from mergekit_lfm.errors import FormatError, reason
from mergekit_lfm.store.files import name_file, open_regular
from mergekit_lfm.store.kinds import ZIP, kind_of
from mergekit_lfm.store.nested import StateDict, find_state_dict
from mergekit_lfm.store.pickles import Calls, Foreign, GarbledError, Unpickler
from mergekit_lfm.store.tensors import ITEMSIZE, LARGEST, TensorSpec, fits

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
LARGEST_MEMBER = 20_000_000  # bytes of a list of members, and of a pickle; 100,000 tensors take about as much
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of files before PyTorch 1.6
# All exceptions of zipfile on bytes that are not an archive.
_GARBLED = (zipfile.BadZipFile, EOFError, ValueError, LookupError, RuntimeError, OverflowError, struct.error)


class Unreadable(Exception):
    """This reader does not support the archive; torch's own loader may."""


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str


@dataclass(frozen=True)
class _Stored:
    """A tensor in the pickle: its storage, first element, shape, strides."""

    storage: _Storage
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def contiguous(self) -> bool:
        expected, strides = 1, []
        for size in reversed(self.shape):
            strides.append(expected)
            expected *= size
        pairs = zip(self.shape, self.stride, reversed(strides), strict=True)
        return expected == 0 or all(size == 1 or stride == want for size, stride, want in pairs)


def _rebuild_tensor(*arguments: Any) -> _Stored | Foreign:
    """The tensor of `torch._utils._rebuild_tensor_v2`, whose last argument marks a sign missing in the bytes."""
    if not 4 <= len(arguments) <= 7:
        return Foreign()
    storage, first, shape, stride = arguments[:4]
    lazy = len(arguments) == 7 and arguments[6]
    if lazy or not isinstance(storage, _Storage) or not isinstance(shape, tuple | list):
        return Foreign()
    if not isinstance(stride, tuple | list) or len(shape) != len(stride):
        return Foreign()
    natural = all(type(n) is int and 0 <= n < LARGEST for n in (first, *shape, *stride))
    return _Stored(storage, first, tuple(shape), tuple(stride)) if natural else Foreign()


def _rebuild_parameter(data: Any = None, *_: Any) -> Any:
    return data if isinstance(data, _Stored) else Foreign()


def _rebuild_dict(items: Any = (), *_: Any) -> dict[Any, Any]:
    """The OrderedDict of these pairs, which Python 2 gave as arguments."""
    pairs = [tuple(pair) for pair in items if isinstance(pair, tuple | list)] if isinstance(items, tuple | list) else []
    if not all(len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise GarbledError("an OrderedDict of something other than names and values")
    return dict(pairs)


_CALLS: Calls = {
    "collections.OrderedDict": _rebuild_dict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
}


def _refer(pid: tuple[Any, ...]) -> Any:
    """The storage of a persistent id."""
    dtype = _STORAGES.get(pid[1].name.removeprefix("torch."))
    return Foreign() if dtype is None else _Storage(dtype, pid[2])


def read_archive(path: Path, address: str = "") -> StateDict:
    """The state dict in a zip archive, in the pickle's order: for each tensor its spec and its offset in the file.

    address: as of `find_state_dict`. Raises FormatError if torch would not read the file either, or read it wrongly,
    and Unreadable if a tensor is not a contiguous range of bytes in it, or if the file is of PyTorch before 1.6.
    """
    try:
        with name_file(path), _Bounded(open_regular(path)) as file:
            if kind_of(file.read(4)) == ZIP:
                return _table(path, file, address)
            file.seek(0)
            _check_legacy(file)
    except GarbledError as error:
        raise FormatError(f"{path}: not a checkpoint that can be loaded safely ({error}); {SAVE_ANEW}") from None
    except FormatError:
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:  # zipfile seeks to wherever a garbled table points
            raise
        raise FormatError(f"{path}: a damaged archive ({error.strerror}); {SAVE_ANEW}") from None
    except _GARBLED as error:
        raise FormatError(f"{path}: a damaged archive ({reason(error)}); {SAVE_ANEW}") from None
    raise Unreadable("saved before PyTorch 1.6")


SAVE_ANEW = "save its state_dict anew"


class _Bounded(io.BufferedReader):
    """A file that is never read by more than a few megabytes at a time: zipfile reads the list of members at once."""

    def __init__(self, fd: int) -> None:
        super().__init__(io.FileIO(fd))
        self.nbytes = os.fstat(fd).st_size

    def read(self, size: int | None = -1) -> bytes:
        limit = LARGEST_MEMBER + 1
        data = super().read(limit if size is None or size < 0 else min(size, limit))
        if len(data) == limit:
            raise zipfile.BadZipFile(f"a list of members that has over {LARGEST_MEMBER:,} bytes")
        return data


def _table(path: Path, file: _Bounded, address: str) -> StateDict:
    with zipfile.ZipFile(file) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise FormatError(
                f"{path} is a TorchScript archive, which holds a program, expected a state dict; load it with "
                "torch.jit.load, and save its state_dict()"
            )
        members = _members(archive.infolist(), path)
        if "data.pkl" not in members:
            raise FormatError(f"{path} is a zip archive without data.pkl, not one of torch.save; {SAVE_ANEW}")
        if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
            raise Unreadable("big-endian")
        unpickler = Unpickler(io.BytesIO(archive.read(members["data.pkl"])), file.nbytes, _CALLS, _refer)
        loaded = unpickler.load()
        if unpickler.foreign:
            raise Unreadable(unpickler.foreign)
        table: dict[str, tuple[TensorSpec, int]] = {}
        found = find_state_dict(loaded, path, _Stored, address)
        for name, stored in found.tensors.items():
            info = members.get(f"data/{stored.storage.key}")
            spec = TensorSpec(name, stored.shape, stored.storage.dtype)
            if not fits(spec):
                raise FormatError(f"{path}: {name} has the shape {shorten(stored.shape)}, expected under 2^63 bytes")
            if info is None or not stored.contiguous():
                raise Unreadable(f"{name} is not contiguous")
            first = stored.first * ITEMSIZE[spec.dtype] if spec.numel else 0
            if first + spec.nbytes > info.file_size:
                raise FormatError(f"{path}: {name} reaches beyond its storage; the file is damaged")
            table[name] = (spec, _data_start(file, info) + first)
    return replace(found, tensors=table)


def _members(infos: list[zipfile.ZipInfo], path: Path) -> dict[str, zipfile.ZipInfo]:
    """The members by their names in the archive's folder. Raises FormatError for any that torch.save does not write."""
    members = {info.filename.partition("/")[2]: info for info in infos}
    if len(members) < len(infos):
        raise FormatError(f"{path} is a damaged archive: two members have one name; {SAVE_ANEW}")
    for info in infos:
        if info.compress_type or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise FormatError(
                f"{path}: {info.filename!r:.80} is compressed or encrypted, expected a stored member, as torch.save "
                f"writes it; {SAVE_ANEW}"
            )
    for name in ("data.pkl", "byteorder"):
        if name in members and members[name].file_size > LARGEST_MEMBER:
            raise FormatError(f"{path}: {name} has over {LARGEST_MEMBER:,} bytes; {SAVE_ANEW} in several files")
    return members


def _check_legacy(file: _Bounded) -> None:
    """Raise GarbledError unless torch can load the pickles of a file before PyTorch 1.6 in bounded memory."""
    unpickler = Unpickler(file, file.nbytes, _CALLS | {"torch._utils._rebuild_tensor_v2": lambda *_: Foreign()}, _refer)
    if unpickler.load() != LEGACY_MAGIC:
        raise GarbledError("neither a zip archive nor the pickles of PyTorch before 1.6")
    for _ in range(4):  # the protocol, the machine, the tensors, their storages
        unpickler.load()


def _data_start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """The offset of a member's data; its local header states the lengths of its name and extra field."""
    file.seek(info.header_offset)
    local = file.read(30)
    if local[:4] != b"PK\3\4" or len(local) < 30 or local[8:10] != b"\0\0":
        raise zipfile.BadZipFile(f"no stored member at byte {info.header_offset}")
    return info.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
