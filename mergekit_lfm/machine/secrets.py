"""Tokens and keys, by their known forms: the one table by which files are searched and messages are masked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

FORMS = {
    "a token of the Hub": r"(?:hf|api_org)_[A-Za-z0-9]{30,}|hf_(?:oauth|jwt)_[A-Za-z0-9_.-]{20,}",
    "a token of GitHub": r"gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{22,}",
    "a token of GitLab": r"glpat-[A-Za-z0-9_-]{20,}",
    "a key of AWS": r"A[KS]IA[A-Z0-9]{16}",
    "a key of OpenAI or Anthropic": r"sk-(?:(?:proj|svcacct|admin|ant)-[A-Za-z0-9_-]{20,}|[A-Za-z0-9]{32,})",
    "a token of Slack": r"xox[abeprs]-[A-Za-z0-9-]{10,}",
    "a private key": r"-----BEGIN (?:[A-Z0-9]+ ){0,4}PRIVATE KEY(?: BLOCK)?-----",
}
# How all of them begin: without groups, the search for it passes over 100 MB/s, ten times as much as for the forms.
BEGINNING = r"hf_|api_org_|gh[oprsu]_|github_pat_|glpat-|A[KS]IA|sk-|xox|-----BEGIN "

_KINDS = tuple(FORMS)
_ANY = "|".join(f"({form})" for form in FORMS.values())
_TEXT, _BYTES, _BEGINNING = re.compile(_ANY), re.compile(_ANY.encode()), re.compile(BEGINNING.encode())

PART = 1 << 20  # bytes that are read at a time
OVERLAP = 1 << 12  # bytes that are read again with the next part: more than any form needs to be recognised
MOST = 100  # lines of a file that are found


def mask_secrets(text: str) -> str:
    """The text with the kind of each secret in its place."""
    return _TEXT.sub(lambda match: match[0] if _within_word(text, match) else f"[{_kind(match)}]", text)


def find_secrets(path: Path, others: Mapping[str, re.Pattern[bytes]] | None = None) -> list[tuple[int, str]]:
    """The lines of a file with a secret, and its kind. others: more patterns to look for, by what they find.

    Reads the file in parts, so that it may be of any size. Stops after `MOST` lines.
    """
    found: dict[tuple[int, str], None] = {}
    with path.open("rb") as file:
        data, line, at_start = b"", 1, True
        while len(found) < MOST and (part := file.read(PART)):
            data += part
            for start, kind in _search(data, others or {}):
                if start or at_start:  # else it was found before, or is the end of a longer word
                    found[line + data.count(b"\n", 0, start), kind] = None
            done = max(0, len(data) - OVERLAP)
            line += data.count(b"\n", 0, done)
            data, at_start = data[done:], at_start and not done
    return sorted(found)[:MOST]


def _search(data: bytes, others: Mapping[str, re.Pattern[bytes]]) -> Iterator[tuple[int, str]]:
    """The positions and kinds of all that is found in the data."""
    for beginning in _BEGINNING.finditer(data):
        match = _BYTES.match(data, beginning.start())
        if match and not _within_word(data, match):
            yield match.start(), _kind(match)
    for kind, pattern in others.items():
        for match in pattern.finditer(data):
            yield match.start(), kind


def _kind(match: re.Match[str] | re.Match[bytes]) -> str:
    return _KINDS[(match.lastindex or 0) - 1]


def _within_word(text: str | bytes, match: re.Match[str] | re.Match[bytes]) -> bool:
    """True if a letter or digit precedes the match."""
    return text[match.start() - 1 : match.start()].isalnum()
