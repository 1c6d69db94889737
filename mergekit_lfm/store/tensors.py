"""Tensors as names, shapes and bytes: the safetensors format, and exact positioned reads and writes.

A file is an 8-byte little-endian header length, a JSON header, then the tensors' bytes without a gap. Files that a
loader would reject are refused here, by name. This module does not import torch.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.files import AGAIN, name_file, open_file, refuse_depth
from mergekit_lfm.store.kinds import HEAD, OTHERS, PAGE, SAFETENSORS, kind_of

# code in the file -> (torch's name, bytes per element)
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "C64": ("complex64", 8),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
CODES = {name: code for code, (name, _) in DTYPES.items()}
ITEMSIZE = dict(DTYPES.values())
FLOATS = ("float16", "bfloat16", "float32", "float64")  # the dtypes to merge; tensors of all others are only copied
ANEW = "write the file anew"
LARGEST = 1 << 63
METADATA = "__metadata__"  # the one key of the header that does not name a tensor
MAX_HEADER = 100_000_000  # the official loader's limit
UNFINISHED = b"\xff" * 8  # a header length that every loader refuses
READ_LIMIT = 1 << 30  # Linux reads and writes at most 2,147,479,552 bytes a call


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name, shape and dtype (by torch's name, such as "bfloat16")."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {self.dtype}"


@dataclass(frozen=True, slots=True)
class Header:
    """A safetensors file's tensors in the order of their bytes, each with its offset in the file."""

    tensors: dict[str, tuple[TensorSpec, int]]
    metadata: dict[str, str]
    data_start: int
    nbytes: int


def promote(dtypes: Iterable[str]) -> str:
    """The dtype that holds the numbers of all: the widest, and float32 for float16 with bfloat16."""
    dtypes = sorted(set(dtypes))
    widest = max(dtypes, key=lambda dtype: ITEMSIZE[dtype])
    return "float32" if {"float16", "bfloat16"} <= set(dtypes) and ITEMSIZE[widest] == 2 else widest


def read_header(path: Path) -> Header:
    """The header of a safetensors file, checked as the official loader does.

    Raises FormatError unless the file's tensors cover its data without hole, overlap or rest.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        return parse_header(path, prefix + file.read(length if length <= min(size, MAX_HEADER) else HEAD), size)


def parse_header(path: Path | str, head: bytes, size: int) -> Header:
    """The header in the first bytes of a file of `size` bytes; messages name `path`. Raises as `read_header` does."""
    length, kind = int.from_bytes(head[:8], "little"), kind_of(head)
    if kind not in (SAFETENSORS, ""):
        raise FormatError(
            "{place}: {found}; {cure}",
            place=path,
            found=f"this is {kind}, not the weights",
            cure=OTHERS.get(kind, "write it as safetensors"),
        )
    if len(head) < 8 or length > MAX_HEADER or 8 + length > size:
        found, cure = _not_safetensors(head, size, length)
        raise FormatError(
            "{place}: {found}; {cure}" if cure else "{place}: {found}", place=path, found=found, cure=cure
        )
    entries = _read_entries(path, head[8 : 8 + length])
    metadata = entries.pop(METADATA, None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("{place}: __metadata__ must map strings to strings; {cure}", place=path, cure=ANEW)
    loose = [entry for entry in entries.values() if not isinstance(entry, dict) or len(entry) > 3]
    refuse_depth(loose, path)  # `_entry` sees every part of the others
    start = 8 + length
    placed = sorted([_entry(path, name, entry) for name, entry in entries.items()], key=itemgetter(1, 2))
    end = 0
    for spec, begin, stop in placed:
        if begin != end:
            kind = "a hole" if begin > end else "an overlap"
            raise FormatError(
                "{place}: {kind} in the data before {name}: {found}, expected {expected}; write it anew",
                place=path,
                kind=kind,
                name=spec.name,
                found=f"byte {begin}",
                expected=end,
            )
        end = stop
    if start + end != size:
        fault = "is truncated" if start + end > size else "has trailing bytes"
        raise FormatError(
            "{place} {fault}: {found}, its header says {expected}; {cure}",
            place=path,
            fault=fault,
            found=f"{size:,} bytes",
            expected=f"{start + end:,}",
            cure=AGAIN,
        )
    return Header({spec.name: (spec, start + begin) for spec, begin, _ in placed}, metadata, start, size)


def _read_entries(path: Path | str, raw: bytes) -> dict[str, Any]:
    """The entries of a header."""
    try:
        entries = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_refuse_halves if b"\\u" in raw else _refuse_repeats,
            parse_int=_read_int if b"-0" in raw else None,
            parse_float=_read_float,
            parse_constant=_read_float,
        )
    except (ValueError, RecursionError) as error:
        raise FormatError(
            "{place}: {found}; {cure}",
            place=path,
            found=f"the header is not JSON as safetensors requires it ({error})",
            cure=ANEW,
        ) from None
    if not isinstance(entries, dict):
        raise FormatError(
            "{place}: the header is {found}, expected {expected}; {cure}",
            place=path,
            found=f"a {type(entries).__name__}",
            expected="an object",
            cure=ANEW,
        )
    return entries


def _refuse_halves(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dict. Raises ValueError for a repeated key, and for escapes that are half of a character."""
    keys = dict(pairs)
    "".join(keys).encode()  # lone surrogates raise UnicodeEncodeError, which is a ValueError
    "".join(value for value in keys.values() if isinstance(value, str)).encode()
    return _refuse_repeats(pairs)


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dict. Raises ValueError for a repeated key."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r:.60} occurs twice")
    return entries


def _read_int(text: str) -> float:
    """The number. As for the official reader, -0 is a float."""
    return -0.0 if text == "-0" else int(text)


def _read_float(text: str) -> float:
    """The number. Raises ValueError unless it is finite, as the official reader does."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.20} is not a finite number")
    return number


def _not_safetensors(head: bytes, size: int, length: int) -> tuple[str, str]:
    """The kind of file that it is instead, and what to do."""
    if head.lstrip()[:1] == b"<":
        return f"this is {PAGE}, not the weights", OTHERS[PAGE]
    if head[:8] == UNFINISHED:
        return "this is the unfinished output of an interrupted run", "run the same merge again to complete it"
    if size < 8:
        return f"{size} bytes are too few for a safetensors file", AGAIN
    return f"not a safetensors file, or truncated: the header would have {length:,} bytes, the file has {size:,}", ""


def _entry(path: Path | str, name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    try:
        code, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if type(code) is not str or type(shape) is not list or {*map(type, shape), type(begin), type(stop)} != {int}:
            raise TypeError
        whole = min(begin, stop, *shape) >= 0
    except (TypeError, KeyError, ValueError):
        raise FormatError(f"{path}: {name} needs dtype, shape and data_offsets, found {shorten(entry)}") from None
    if code not in DTYPES:
        raise FormatError(f"{path}: {name} has dtype {code!r:.60}, expected one of {', '.join(DTYPES)}")
    name = sys.intern(name)  # models share names: one object is found faster in dicts than equal ones
    spec = TensorSpec(name, tuple(shape), DTYPES[code][0])
    if not whole or not fits(spec):
        raise FormatError(f"{path}: {name} has the shape {shorten(shape)}, expected sizes from 0 and under 2^63 bytes")
    if spec.nbytes != stop - begin:
        raise FormatError(
            f"{path}: {name} {shorten(shape)} {code} needs {spec.nbytes:,} bytes, its data_offsets are {begin}, {stop}"
        )
    return spec, begin, stop


def fits(spec: TensorSpec) -> bool:
    """True if each size, and the bytes of the sizes but for zeros, are below 2^63, as all loaders need them."""
    nbytes = ITEMSIZE[spec.dtype]
    for size in spec.shape:  # not math.prod, which takes hours for a million large sizes
        nbytes *= size or 1
        if nbytes >= LARGEST:
            return False
    return True


def encode_header(
    tensors: Iterable[TensorSpec], metadata: Mapping[str, str], congruent: int | None = None
) -> tuple[bytes, dict[str, int]]:
    """The bytes of a header, length included, and each tensor's offset in the file. Tensors keep their order.

    With `congruent` the data starts at this offset modulo 4096, so that a filesystem with reflinks can share unchanged
    blocks with the input whose data starts there too (aligned or not, as in the input); otherwise at a multiple of 8.
    """
    entries: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for spec in tensors:
        if spec.name == METADATA:
            raise FormatError(f"a tensor is named {METADATA}, which safetensors files keep for metadata; rename it")
        begin, end = end, end + spec.nbytes
        entries[spec.name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
        offsets[spec.name] = begin
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8 if congruent is None else (congruent - 8 - len(raw)) % 4096)
    if len(raw) > MAX_HEADER:
        raise FormatError(
            f"a header of {len(raw):,} bytes is over the format's limit of {MAX_HEADER:,}; use more shards"
        )
    return len(raw).to_bytes(8, "little") + raw, {name: 8 + len(raw) + offset for name, offset in offsets.items()}


def read_exactly(fd: int, offset: int, into: memoryview, path: Path) -> None:
    """Fill `into` from the file at `offset`. Raises FormatError if the file ends too early."""
    done = 0
    while done < len(into):
        with name_file(path):
            count = os.preadv(fd, [into[done : done + READ_LIMIT]], offset + done)
        if not count:
            raise FormatError(f"{path} ended at byte {offset + done:,}: it changed during the merge; merge again")
        done += count


def write_exactly(fd: int, offset: int, data: memoryview) -> None:
    """Write all of `data` to the file at `offset`."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done : done + READ_LIMIT], offset + done)
