#!/usr/bin/env python3
"""Make the texts of recipes/experts/: docstrings of four packages, to tune on, and held out to judge on.

    pip install -c constraints.txt -e ".[test,tune]"
    python recipes/make/experts.py recipes/experts

Writes PACKAGE.jsonl and PACKAGE.test.jsonl, lines {"text": ...}, from the sources of scipy, scikit-learn, torch and
transformers as they are installed; nothing is imported from them. A docstring is in one file alone, and a paragraph of
a test file is in no file to tune on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from domains import PACKAGES, docstrings_of, each_once

TRAINED, JUDGED = 50_000, 12_000  # letters of each package
SHORTEST, LONGEST = 300, 3000  # letters of a docstring


def texts_of(package: str) -> Iterator[str]:
    """The docstrings of a package that are of middle length."""
    yield from each_once(t for t in docstrings_of(package) if SHORTEST <= len(t) <= LONGEST and t.isascii())


def paragraphs(text: str) -> set[str]:
    """The paragraphs that say something, on one line each."""
    found = (" ".join(block.split()) for block in text.split("\n\n"))
    return {paragraph for paragraph in found if len(paragraph) >= 40}


def divide(texts: Iterator[str]) -> tuple[list[str], list[str]]:
    """Texts to judge on, and others to tune on that share no paragraph with them or with one another."""
    judged, trained, known = list[str](), list[str](), set[str]()
    for text in texts:
        into, most = (judged, JUDGED) if sum(map(len, judged)) < JUDGED else (trained, TRAINED)
        if sum(map(len, into)) >= most:
            break
        if not paragraphs(text) & known:
            into.append(text)
            known |= paragraphs(text)
    return judged, trained


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write")
    out: Path = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        judged, trained = divide(texts_of(package))
        for name, texts in ((f"{package}.test", judged), (package, trained)):
            lines = [json.dumps({"text": text}) for text in texts]
            (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
