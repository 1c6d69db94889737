"""The tokens of a model's tokenizer by their ids, from the files that state them as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.files import read_bytes, read_json, read_small_text

WHOLE = "tokenizer.json"
FILES = (WHOLE, "vocab.json", "vocab.txt")  # the first that a model has counts
ADDED = "added_tokens.json"  # tokens beside those of the other files; tokenizer.json has all


@dataclass(frozen=True)
class Tokens:
    """A file that states tokens, and one with those added to them."""

    path: Path
    added: Path | None = None

    @property
    def whole(self) -> bool:
        """True if the file is a whole tokenizer."""
        return self.path.name == WHOLE

    @cached_property
    def digest(self) -> str:
        """xxh3-128 of the files' bytes."""
        return xxhash.xxh3_128_hexdigest(b"".join(read_bytes(path) for path in (self.path, self.added) if path))

    @cached_property
    def by_id(self) -> Mapping[int, str]:
        """The tokens by their ids. Raises FormatError if a file cannot be read."""
        if self.whole:
            return dict(_entries(self.data))
        text = self.path.suffix == ".txt"
        own = enumerate(read_small_text(self.path).splitlines()) if text else _reversed(self.data)
        return {**dict(own), **dict(_reversed(read_json(self.added)) if self.added else ())}

    @cached_property
    def data(self) -> Any:
        """The JSON in the file. Raises FormatError if it cannot be read."""
        return read_json(self.path)


def find_tokens(model: Checkpoint) -> Tokens | None:
    """The files that state a model's tokens; None without any. On the Hub they are downloaded."""
    if model.snapshot is not None:
        names = [name for name in FILES if name in model.snapshot.sizes][:1]
        model.snapshot.fetch([*names, *(name for name in (ADDED,) if names and name in model.snapshot.sizes)])
    path = next((path for name in FILES if (path := model.path / name).is_file()), None)
    added = model.path / ADDED
    return None if path is None else Tokens(path, added if path.name != WHOLE and added.is_file() else None)


def _entries(data: Any) -> Iterable[tuple[int, str]]:
    """(id, token) of a tokenizer.json: of its model, and those added."""
    if not isinstance(data, dict):
        return
    model = data.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # of a Unigram model: [token, score]
        yield from ((i, str(entry[0])) for i, entry in enumerate(vocabulary) if isinstance(entry, list) and entry)
    yield from _reversed(vocabulary)
    added = data.get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            yield entry["id"], str(entry.get("content"))


def _reversed(data: Any) -> Iterable[tuple[int, str]]:
    if isinstance(data, dict):
        yield from ((number, token) for token, number in data.items() if isinstance(number, int))
