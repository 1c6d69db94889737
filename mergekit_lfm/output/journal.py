"""The journal of an unfinished output: the plan's digest, the states of its input files, then a line for each segment.

A run that does all of the work has one, JOURNAL. Of runs that share it each has its own beside that, with the same
first lines; the number of the run's part follows the name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from mergekit_lfm.store.files import name_file, open_file, parse_json
from mergekit_lfm.store.locks import hold
from mergekit_lfm.store.state import FileState

JOURNAL = "merge.journal"
LONGEST_LINE = 1_000_000  # bytes; a receipt has some hundred
_ENCODER = json.JSONEncoder(sort_keys=True)


@dataclass(frozen=True, slots=True)
class Receipt:
    """The record of a written segment: the xxh3-128 of its bytes, and the names of the tensors that were not finite.

    inputs: the xxh3-128 of the segment of each tensor that it was made from; () if it is a copy of them.
    """

    tensor: str
    segment: int
    xxh3: str
    nonfinite: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()

    def as_line(self) -> str:
        """Its line in the journal: its entries as JSON, with a check of them."""
        data = {"tensor": self.tensor, "segment": self.segment, "xxh3": self.xxh3}
        text = _ENCODER.encode({**data, "nonfinite": self.nonfinite, "inputs": self.inputs})
        return f'{text[:-1]}, "check": "{_check_of(text)}"}}\n'

    @classmethod
    def of_data(cls, data: Any) -> Receipt:
        """The receipt with these entries. Raises ValueError if they are not as they were written."""
        entries = {name: value for name, value in data.items() if name != "check"} if isinstance(data, Mapping) else {}
        if not entries or data["check"] != _check_of(_ENCODER.encode(entries)):
            raise ValueError("the receipt was changed")
        return cls(**{**entries, "nonfinite": tuple(entries["nonfinite"]), "inputs": tuple(entries["inputs"])})


def _check_of(text: str) -> str:
    """xxh3-64 of a receipt's entries: digests of inputs, unlike those of outputs, are not computed again."""
    return xxhash.xxh3_64_hexdigest(text.encode())


@dataclass(frozen=True, slots=True)
class Journal:
    """The content of a journal. nbytes: of its whole lines; a torn one may follow."""

    states: tuple[FileState, ...]
    receipts: tuple[Receipt, ...]
    nbytes: int


def first_lines(digest: str, states: Iterable[FileState]) -> bytes:
    """The lines with which the journal of a plan begins."""
    entries = ({"plan": digest}, *({**asdict(state), "path": str(state.path)} for state in states))
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def read_journal(path: Path, digest: str) -> Journal | None:
    """The content of a journal, up to a torn last line; None if it is not of the plan with this digest."""
    states, receipts, nbytes = list[FileState](), list[Receipt](), 0
    with open_file(path) as lines:
        for line in iter(lambda: lines.readline(LONGEST_LINE), b""):
            try:
                entry = parse_json(line, path)
                if not nbytes:
                    if entry != {"plan": digest}:
                        return None
                elif "path" in entry:
                    state = FileState(**{**entry, "path": Path(entry["path"])})
                    os.fsencode(state.path)  # a path cannot hold half of a character
                    states += [state] if line.endswith(b"\n") else []
                else:
                    receipt = Receipt.of_data(entry)
                    receipts += [receipt] if line.endswith(b"\n") else []
            except (ValueError, TypeError, KeyError):
                break
            if not line.endswith(b"\n"):
                break
            nbytes += len(line)
    return Journal(tuple(states), tuple(receipts), nbytes) if nbytes else None


def is_journal(name: str) -> bool:
    """True for the name of a journal, of a run alone or of one part."""
    return name == JOURNAL or (name.startswith(f"{JOURNAL}.") and name[len(JOURNAL) + 1 :].isdigit())


def journal_of(part: int | None) -> str:
    """The name of the journal of a run alone, or of one part, from 1."""
    return JOURNAL if part is None else f"{JOURNAL}.{part}"


def part_journals(partial: Path) -> Iterator[Path]:
    """The journals of parts in an unfinished output."""
    yield from (path for path in sorted(partial.iterdir()) if path.name != JOURNAL and is_journal(path.name))


def running(journals: Sequence[Path]) -> list[Path]:
    """Those of the journals that other runs hold."""
    held = list[Path]()
    for path in journals:
        with name_file(path):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            if not hold(fd):
                held.append(path)
        finally:
            os.close(fd)
    return held
