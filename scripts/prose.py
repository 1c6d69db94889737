#!/usr/bin/env python3
"""Check that docstrings, comments, messages and pages are in plain English: no words of the dialect listed here.

python scripts/prose.py               # the whole tree; exit code 1 if a sentence has one
python scripts/prose.py docs README.md
"""

from __future__ import annotations

import ast
import os
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACES = (
    "mergekit_lfm",
    "benchmarks",
    "scripts",
    "recipes",
    "tests",
    "docs",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
)

# What reads like a translation, and what to write instead.
DIALECT = {
    r"\btold\b": "name who reports it: 'one message lists ...'",
    r"(?<!\bit )\b(?:is|are|was|be) said\b(?! to be)": "say it: 'the message names ...'",
    r"\bto be had\b": "'available'",
    r"\b(?:its|the) likes\b": "name the things",
    r"\bof which\b": "split the sentence",
    r"(?:^|[.:;] )What (?!\w+ \w+\?)[^?]*$": "start with a subject and a verb: 'Return ...', 'The ...'",
    r"\b\w*Error where\b": "'Raises PlanError if ...'",
    r"\b(?:is|are) none\b": "'does not exist', 'there are no ...'",
    r"(?<!\bthere )\b(?:is|are) no (?!longer|more|less|different|better|worse|need|way|room|such|free)\w+": "'not a'",
    r"\b(?:where|while|as|if) there (?:is|are) none\b": "'without one', 'if it has none'",
    r"\bwhat (?:is|are|was|were) (?:found|asked|given|there|held|said|made|done|read|kept)\b": "name the thing",
    r"\bon the terminal\b(?= calls)": "rephrase",
}
PATTERNS = [
    (re.compile(pattern, re.IGNORECASE if "What" not in pattern else 0), cure) for pattern, cure in DIALECT.items()
]


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """The prose of a file with its line numbers: docstrings, comments and messages of Python, all lines of a page."""
    if path.suffix != ".py":
        code = False
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            code ^= line.startswith("```")
            if path.suffix == ".md" and not code:
                yield number, line
            elif path.suffix in (".yaml", ".yml", ".toml") and "#" in line:
                yield number, line.partition("#")[2].strip()
        return
    with tokenize.open(path) as file:
        comments = [token for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.COMMENT]
    yield from ((token.start[0], token.string.lstrip("#: ")) for token in comments)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            for i, line in enumerate(node.value.splitlines()):
                yield node.lineno + i, line.strip()


def files_of(places: list[Path]) -> Iterator[Path]:
    """All files with prose in these folders and files."""
    for place in places:
        inside = sorted(place.rglob("*")) if place.is_dir() else [place]
        yield from (
            path for path in inside if path.suffix in (".py", ".md", ".yaml") and path != Path(__file__).resolve()
        )


def findings(places: list[Path]) -> list[str]:
    """A line for every sentence that has a word of the list: where it stands, the word, and the cure."""
    return [
        f"{os.path.relpath(path)}:{number}: {match[0]!r}: {cure}"
        for path in files_of(places)
        for number, line in texts_of(path)
        for pattern, cure in PATTERNS
        if (match := pattern.search(line))
    ]


def main() -> int:
    """Print every sentence that has a word of the list, and how many there are."""
    lines = findings([Path(name).resolve() for name in sys.argv[1:]] or [ROOT / name for name in PLACES])
    print("\n".join([*lines, f"{len(lines)} sentences to rewrite"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
