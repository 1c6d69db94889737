"""The texts in a file, one for each line of JSONL or plain text, with their labels and positives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.files import open_file, read_text

SHOWN_PROBLEMS = 10

T = TypeVar("T")


class DataLine(NamedTuple):
    """The content of one line of a data file."""

    text: str
    number: int = 1  # of the line in its file
    label: int | None = None
    positive: str | None = None


def read_lines(path: Path, *, whole: bool) -> list[DataLine]:
    """The lines of a .jsonl or .txt file that are not blank; with `whole` a .txt file is one text."""
    content = _read_content(path)
    if path.suffix == ".txt":
        lines = [content] if whole else content.splitlines()
        return [DataLine(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    parsed, problems = _read_objects(content, _read_line)
    unlabelled = sum(line.label is None for line in parsed)
    if not problems and unlabelled not in (0, len(parsed)):
        problems.append(f'{unlabelled} of {len(parsed)} lines have no "label", the others do')
    if problems:
        refuse(path, problems, 'an object {"text": ...} on each line, and a "label" from 0 on all lines or none')
    return parsed


def first_line(path: Path) -> dict[str, Any]:
    """The object on the first line of a .jsonl file that is not blank; {} for any other file or line."""
    if path.suffix != ".jsonl":
        return {}
    with open_file(path) as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        entry = json.loads(first)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def has_answers(path: Path) -> bool:
    """Whether a file has prompts with answers, or conversations, by its first line."""
    return not {"prompt", "messages"}.isdisjoint(first_line(path))


def read_objects(path: Path, read: Callable[[dict[str, Any], int], T | str], expected: str) -> list[T]:
    """The lines of a .jsonl file, each as `read` makes it of the object on it and its number.

    read: returns a description of its problem for a wrong one. expected: the lines, in words.
    """
    parsed, problems = _read_objects(_read_content(path), read)
    if problems:
        refuse(path, problems, expected)
    return parsed


def _read_content(path: Path) -> str:
    """The text of a .jsonl or .txt file, which is not empty."""
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
    return content


def _read_objects(content: str, read: Callable[[dict[str, Any], int], T | str]) -> tuple[list[T], list[str]]:
    """The results of `read` for the lines that are not blank, and the problems of the others."""
    parsed, problems = list[T](), list[str]()
    for number, text in enumerate(content.split("\n"), 1):  # splitlines would cut at U+2028, which JSON may hold
        if text.strip():
            try:
                entry = json.loads(text)
                json.dumps(entry, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                problems.append(f"line {number}: half a character, {error.object[error.start]!a}")
                continue
            except (ValueError, RecursionError) as error:
                problems.append(f"line {number}: not JSON ({error})")
                continue
            line = read(entry if isinstance(entry, dict) else {}, number)
            if isinstance(line, str):
                problems.append(f"line {number}: {line}")
            else:
                parsed.append(line)
    return parsed, problems


def _read_line(entry: dict[str, Any], number: int) -> DataLine | str:
    """The line, or a description of its problem."""
    if not is_text(entry.get("text")):
        return 'no "text", or an empty one'
    label, positive = entry.get("label"), entry.get("positive")
    if label is not None and (not isinstance(label, int) or isinstance(label, bool) or label < 0):
        return f'"label" is {json.dumps(label)}, not a whole number from 0'
    if positive is not None and not is_text(positive):
        return '"positive" is not a text, or is empty'
    return DataLine(entry["text"], number, label, positive)


def is_text(value: object) -> bool:
    """Whether a value is a text that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def refuse(path: Path, problems: list[str], expected: str) -> NoReturn:
    """Raise a FormatError that lists the first ten wrong lines."""
    more = [f"and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
    listed = "\n  ".join([*problems[:SHOWN_PROBLEMS], *more])
    raise FormatError(f"{path}: expected {expected}; found\n  {listed}\nCorrect these lines")
