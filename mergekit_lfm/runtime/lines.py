"""The texts in a file, one for each line of JSONL or plain text, with their labels and positives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple, NoReturn

from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.files import read_text

SHOWN_PROBLEMS = 10


class DataLine(NamedTuple):
    """The content of one line of a data file."""

    text: str
    number: int = 1  # of the line in its file
    label: int | None = None
    positive: str | None = None


def read_lines(path: Path, *, whole: bool) -> list[DataLine]:
    """The lines of a .jsonl or .txt file that are not blank; with `whole` a .txt file is one text."""
    if path.suffix not in (".jsonl", ".txt"):
        raise FormatError(
            f"{path}: found the suffix {path.suffix or '(none)'}; expected .jsonl or .txt for texts, .npz for arrays. "
            "Convert it, or correct its suffix"
        )
    try:
        content = read_text(path, most=None)
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: {error}; expected UTF-8 text. Save it as UTF-8") from None
    if not content.strip():
        raise FormatError(f"{path} is empty; expected at least one text. Give a file that has some")
    if path.suffix == ".txt":
        lines = [content] if whole else content.splitlines()
        return [DataLine(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    problems: list[str] = []
    parsed = []
    for number, text in enumerate(content.split("\n"), 1):  # splitlines would cut at U+2028, which JSON may hold
        if text.strip():
            entry = _json_line(text, number)
            if isinstance(entry, DataLine):
                parsed.append(entry)
            else:
                problems.append(f"line {number}: {entry}")
    unlabelled = sum(line.label is None for line in parsed)
    if not problems and unlabelled not in (0, len(parsed)):
        problems.append(f'{unlabelled} of {len(parsed)} lines have no "label", the others do')
    if problems:
        refuse(path, problems, 'an object {"text": ...} on each line, and a "label" from 0 on all lines or none')
    return parsed


def _json_line(text: str, number: int) -> DataLine | str:
    """The parsed line, or a description of its problem."""
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str) or not entry["text"].strip():
        return 'no "text", or an empty one'
    label, positive = entry.get("label"), entry.get("positive")
    if label is not None and (not isinstance(label, int) or isinstance(label, bool) or label < 0):
        return f'"label" is {json.dumps(label)}, not a whole number from 0'
    if positive is not None and (not isinstance(positive, str) or not positive.strip()):
        return '"positive" is not a text, or is empty'
    return DataLine(entry["text"], number, label, positive)


def refuse(path: Path, problems: list[str], expected: str) -> NoReturn:
    """Raise a FormatError that lists the first ten wrong lines."""
    more = [f"and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
    listed = "\n  ".join([*problems[:SHOWN_PROBLEMS], *more])
    raise FormatError(f"{path}: expected {expected}; found\n  {listed}\nCorrect these lines")
