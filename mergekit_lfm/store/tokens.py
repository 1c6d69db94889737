"""The tokens of a model's tokenizer by their ids, from the files that state them as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.files import read_bytes, read_json, read_text

FILES = ("tokenizer.json", "vocab.json", "vocab.txt")  # the first that a model has counts


@dataclass(frozen=True)
class Tokens:
    """A file that states tokens."""

    path: Path

    @cached_property
    def digest(self) -> str:
        """xxh3-128 of the file's bytes."""
        return xxhash.xxh3_128_hexdigest(read_bytes(self.path))

    @cached_property
    def by_id(self) -> Mapping[int, str]:
        """The tokens by their ids. Raises FormatError if the file cannot be read."""
        if self.path.suffix == ".txt":
            return dict(enumerate(read_text(self.path).splitlines()))
        data = read_json(self.path)
        return dict(_entries(data) if self.path.name == "tokenizer.json" else _reversed(data))


def find_tokens(model: Checkpoint) -> Tokens | None:
    """The file that states a model's tokens; None without one. On the Hub it is downloaded."""
    if model.snapshot is not None:
        model.snapshot.fetch([name for name in FILES if name in model.snapshot.sizes][:1])
    return next((Tokens(path) for name in FILES if (path := model.path / name).is_file()), None)


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
