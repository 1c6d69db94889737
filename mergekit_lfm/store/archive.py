"""PyTorch's zip archives (`.bin`, `.pt`) as tables of tensors with file offsets, without torch or pickled code.

`torch.save` stores every storage uncompressed, so a contiguous tensor is a byte range as in safetensors. The unpickler
here knows the few names that a state dict needs, and builds only this table.
"""

from __future__ import annotations

import errno
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.files import name_file
from mergekit_lfm.store.tensors import ITEMSIZE, TensorSpec

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
WRAPPERS = ("state_dict", "model", "module")
# All exceptions of zipfile and pickle on bytes that are not such an archive.
_GARBLED = (
    *(zipfile.BadZipFile, pickle.UnpicklingError, EOFError, ValueError, TypeError),
    *(AttributeError, LookupError, RuntimeError, OverflowError, MemoryError),
)


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


def _rebuild_tensor(
    storage: Any, first: int, shape: Any, stride: Any, _grad: Any = None, _hooks: Any = None, lazy: Any = None
) -> _Stored:
    """The tensor of `torch._utils._rebuild_tensor_v2`. lazy: marks a conjugation or sign missing in the bytes."""
    shape, stride = tuple(shape), tuple(stride)
    natural = all(isinstance(n, int) and n >= 0 for n in (first, *shape, *stride)) and len(shape) == len(stride)
    if lazy or not natural or not isinstance(storage, _Storage):
        raise Unreadable(f"a tensor of {storage!r}, {first!r}, {shape!r}, {stride!r}, {lazy!r}")
    return _Stored(storage, first, shape, stride)


def _rebuild_parameter(data: _Stored, *_: Any) -> _Stored:
    return data


_NAMES = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", storage): dtype for storage, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise Unreadable(f"{module}.{name}")
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, str):
            raise Unreadable(f"persistent id {pid!r}")
        return _Storage(dtype, key)


def state_dict(loaded: Any, path: Path, kind: type) -> dict[str, Any]:
    """The mapping of names to tensors (instances of `kind`) in a loaded checkpoint file, one wrapper deep."""
    for key in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping):
        raise FormatError(f"{path} holds a {type(loaded).__name__}, expected a state dict of names and tensors")
    others = [str(key) for key, value in loaded.items() if not isinstance(value, kind)]
    if others:
        raise FormatError(f"{path}: {', '.join(others[:5])} are not tensors; save only the model's state_dict()")
    return {str(key): value for key, value in loaded.items()}


def read_archive(path: Path) -> dict[str, tuple[TensorSpec, int]]:
    """The tensors of a zip archive in the pickle's order, each with its offset in the file.

    Raises Unreadable if the file is not such an archive, or if a tensor is not a contiguous range of bytes in it.
    """
    try:
        with name_file(path):
            return _table(path)
    except FormatError:
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:  # zipfile seeks to wherever a garbled table points
            raise
        raise Unreadable(str(error)) from None
    except _GARBLED as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from None


def _table(path: Path) -> dict[str, tuple[TensorSpec, int]]:
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "data.pkl" not in members or any(info.compress_type for info in members.values()):
            raise Unreadable("no data.pkl, or compressed members")
        if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
            raise Unreadable("big-endian")
        loaded = _Unpickler(archive.open(members["data.pkl"])).load()
        table: dict[str, tuple[TensorSpec, int]] = {}
        for name, stored in state_dict(loaded, path, _Stored).items():
            info = members.get(f"data/{stored.storage.key}")
            spec = TensorSpec(name, stored.shape, stored.storage.dtype)
            if info is None or not stored.contiguous():
                raise Unreadable(f"{name} is not contiguous")
            first = stored.first * ITEMSIZE[spec.dtype] if spec.numel else 0
            if first + spec.nbytes > info.file_size:
                raise FormatError(f"{path}: {name} reaches beyond its storage; the file is damaged")
            table[name] = (spec, _data_start(file, info.header_offset) + first)
    return table


def _data_start(file: BinaryIO, header: int) -> int:
    """The offset of a member's data; its local header states the lengths of its name and extra field."""
    file.seek(header)
    local = file.read(30)
    if local[:4] != b"PK\3\4" or len(local) < 30:
        raise Unreadable(f"no member at byte {header}")
    return header + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
