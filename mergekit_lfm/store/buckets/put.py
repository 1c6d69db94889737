"""Put files into a bucket, each whole or not at all, and tell which are there already.

A file goes with the digest of its bytes as metadata, so that an upload that was interrupted does not send it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.buckets.client import again, import_obstore, open_store
from mergekit_lfm.store.buckets.names import BucketName
from mergekit_lfm.store.files import open_file

TAG = "lfmxxh3"  # the metadata with the xxh3-128 of the bytes; letters alone, as one store allows no others
PART = 16 << 20  # bytes of a part of an upload, at least
MOST_PARTS = 9_000  # of the 10,000 that stores take
AT_ONCE = 6  # parts


def tag_of(name: BucketName, file: str) -> str:
    """The digest that the file was put with, "" for one that is not there, or was not put by `put_file`."""
    obstore = import_obstore()

    def look() -> Any:
        try:
            return obstore.get(open_store(name), file, options={"head": True}).attributes
        except FileNotFoundError:
            return {}

    return str(again(name, file, look).get(TAG, ""))


def put_file(name: BucketName, file: str, path: Path, digest: str, advance: Callable[[int], None]) -> None:
    """Put a file into the folder, in parts if it is large. digest: the xxh3-128 of its bytes, in hex.

    advance is called with each number of bytes that is sent. Raises PlanError if the store refuses, ConnectionError if
    the connection fails; parts that were sent are then removed.
    """
    size, obstore = path.stat().st_size, import_obstore()

    def send() -> None:
        if tag_of(name, file) == digest:  # the answer to an earlier try was lost
            return
        store, attributes = open_store(name, sending=True), {TAG: digest}
        if size <= PART:
            with open_file(path) as source:
                obstore.put(store, file, source.read(), attributes=attributes, use_multipart=False)
            return
        part = max(PART, -(-size // MOST_PARTS))
        parts = _parts(path, part, advance)
        try:
            obstore.put(store, file, parts, attributes=attributes, chunk_size=part, max_concurrency=AT_ONCE)
        except FileNotFoundError:  # the upload was complete already when its answer broke off
            if tag_of(name, file) != digest:
                raise

    again(name, file, send)
    if size <= PART:
        advance(size)


def _parts(path: Path, nbytes: int, advance: Callable[[int], None]) -> Iterator[bytes]:
    with open_file(path) as source:
        while data := source.read(nbytes):
            yield data
            advance(len(data))


def put_text(name: BucketName, file: str, text: str) -> None:
    """Put a small file into the folder. Raises as `put_file` does."""
    again(name, file, lambda: import_obstore().put(open_store(name), file, text.encode(), use_multipart=False))


def create_text(name: BucketName, file: str, text: str) -> bool:
    """Put a small file into the folder, if none of its name is there: else False. Raises as `put_file` does."""
    obstore = import_obstore()

    def create() -> bool:
        try:
            obstore.put(open_store(name), file, text.encode(), use_multipart=False, mode="create")
        except Exception as error:
            if type(error).__name__ != "AlreadyExistsError":
                raise
            return False
        return True

    return bool(again(name, file, create))


def read_small(name: BucketName, file: str, most: int) -> bytes:
    """The content of a file of the folder. Raises PlanError if it is larger than `most`, else as `put_file` does."""
    obstore, store = import_obstore(), open_store(name)
    if again(name, file, lambda: obstore.head(store, file))["size"] > most:
        raise PlanError(
            "{place} has over {most} bytes; {cure}", place=f"{name}/{file}", most=f"{most:,}", cure="move it"
        )
    return bytes(again(name, file, lambda: obstore.get(store, file).bytes()))


def delete_files(name: BucketName, files: Iterable[str]) -> None:
    """Delete files of the folder; those that are not there are gone already. Raises as `put_file` does."""

    def delete(file: str) -> None:
        with suppress(FileNotFoundError):
            import_obstore().delete(open_store(name), file)

    for file in files:
        again(name, file, partial(delete, file))
