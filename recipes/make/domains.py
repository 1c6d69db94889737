#!/usr/bin/env python3
"""Make data for a classifier: first paragraphs of docstrings, and which of four packages each is from.

    pip install -c constraints.txt -e ".[test,tune]"
    python recipes/make/domains.py recipes/domains

Writes train.jsonl, dev.jsonl and test.jsonl, lines {"text": ..., "label": 0}, balanced, from the sources of scipy,
scikit-learn, torch and transformers as they are installed; nothing is imported from them. Names of the packages are
taken out of the texts. A docstring is in one file alone.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

PACKAGES = ("scipy", "sklearn", "torch", "transformers")
NAMES = re.compile(r"\b(scipy|sklearn|scikit-learn|torch|pytorch|transformers|hugging ?face)\b", re.IGNORECASE)
SIZES = {"train": 200, "dev": 40, "test": 100}  # texts of each package
SHORTEST, LONGEST = 60, 600  # letters of a text


def docstrings_of(package: str) -> Iterator[str]:
    """The docstrings of a package's functions and classes, as its sources have them."""
    for path in sorted((Path(sysconfig.get_path("purelib")) / package).rglob("*.py")):
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield ast.get_docstring(node) or ""


def each_once(texts: Iterable[str]) -> Iterator[str]:
    """The texts, each once, in an order by their digests."""
    yield from sorted({*texts}, key=lambda text: hashlib.sha256(text.encode()).hexdigest())


def texts_of(package: str) -> Iterator[str]:
    """The first paragraphs of a package's docstrings, without the names of packages."""
    firsts = (" ".join(text.split("\n\n")[0].split()) for text in docstrings_of(package))
    texts = (NAMES.sub("it", first) for first in firsts)
    yield from each_once(text for text in texts if SHORTEST <= len(text) <= LONGEST)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write")
    out: Path = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[str]] = {name: [] for name in SIZES}
    for label, package in enumerate(PACKAGES):
        texts = texts_of(package)
        for name, size in SIZES.items():
            files[name] += [json.dumps({"text": next(texts), "label": label}) for _ in range(size)]
    for name, lines in files.items():
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
