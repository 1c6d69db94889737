"""Read files of strangers: regular ones alone, small ones whole, the JSON in them of bounded depth.

In a folder of a model a pipe in place of a config would hang, a device would never end. Errors name the file.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any

from mergekit_lfm.errors import FormatError

SMALL = 100_000_000  # bytes; tokenizers, the largest files beside the weights, have up to 40 MB
PART = 1 << 20  # bytes that are read at a time
AGAIN = "fetch or write it again"
DEEPEST = 100  # levels of lists and mappings; the official reader of safetensors headers stops at 128
KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


@contextmanager
def name_file(path: Path) -> Iterator[None]:
    """Add the name of the file to an OSError from a descriptor; those of connections have no number."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def open_regular(path: Path) -> int:
    """A descriptor of a file, open for reading. Raises FormatError for a pipe, a socket, a device or a folder."""
    _refuse_others(path, path.stat().st_mode)  # opening a device may act on it
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe that took the file's place since would block
    try:
        _refuse_others(path, os.fstat(fd).st_mode)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def open_file(path: Path) -> Iterator[BufferedReader]:
    """A regular file, open for reading within the block, whose OSErrors name it. Raises as `open_regular` does."""
    with name_file(path), os.fdopen(open_regular(path), "rb") as file:
        yield file


def _refuse_others(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "something else")
        cure = "put the file itself there"
        raise FormatError(
            "{place} is {found}, expected {expected}; {cure}",
            place=path,
            found=kind,
            expected="a regular file",
            cure=cure,
        )


def read_bytes(path: Path, most: int | None = SMALL) -> bytes:
    """The content of a regular file of at most `most` bytes, None for any size. Raises FormatError for any other."""
    with open_file(path) as file:
        content = file.read(-1 if most is None else most + 1)
    if most is not None and len(content) > most:
        raise FormatError(
            "{place} has {found}, expected {expected}; {cure}",
            place=path,
            found=f"over {most:,} bytes",
            expected="a small file",
            cure=AGAIN,
        )
    return content


def digest_file(path: Path) -> str:
    """xxh3-128 of a regular file of any size, in hex. Raises FormatError for any other."""
    import xxhash  # no package is loaded to print a command's help

    digest = xxhash.xxh3_128()
    with open_file(path) as file:
        while part := file.read(PART):
            digest.update(part)
    return digest.hexdigest()


def read_text(path: Path, most: int | None = SMALL) -> str:
    """The UTF-8 text in a file as `read_bytes` reads it, with line ends as `open` gives them, without Windows' mark."""
    return read_bytes(path, most).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def read_small_text(path: Path) -> str:
    """The text as `read_text` gives it. Raises FormatError if it is not UTF-8."""
    try:
        return read_text(path)
    except UnicodeDecodeError as error:
        raise FormatError(
            "{place}: {found}; {cure}",
            place=path,
            found=f"not UTF-8 text ({error.reason} in byte {error.start:,})",
            cure=AGAIN,
        ) from None


def read_json(path: Path) -> Any:
    """The JSON in a small file. Raises FormatError, or OSError if it cannot be read."""
    return parse_json(read_bytes(path), path)


def parse_json(text: str | bytes, label: object) -> Any:
    """The JSON in `text`, of at most 100 levels. Raises FormatError, which names `label`."""
    try:
        data = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except RecursionError:
        raise FormatError(_too_deep(label)) from None
    except ValueError as error:
        raise FormatError("{place}: {found}; {cure}", place=label, found=f"not JSON ({error})", cure=AGAIN) from None
    refuse_depth(data, label)
    return data


def refuse_depth(data: Any, label: object) -> None:
    """Raise FormatError if lists and mappings of parsed JSON lie in one another over more than 100 levels."""
    containers = [data] if isinstance(data, dict | list) else []
    for _ in range(DEEPEST):
        if not containers:
            return
        groups = [part.values() if isinstance(part, dict) else part for part in containers]
        containers = [child for child in chain.from_iterable(groups) if isinstance(child, (dict, list))]
    if any(containers):  # those that are not empty
        raise FormatError(_too_deep(label))


def _too_deep(label: object) -> str:
    return f"{label}: lists and mappings lie in one another over more than {DEEPEST} levels; flatten them"
