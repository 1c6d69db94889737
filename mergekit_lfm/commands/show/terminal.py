"""Tables, counts and lines on standard output and standard error, whether or not somebody reads them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TextIO

import click

from mergekit_lfm.machine.text import printable, printable_line


def table(rows: Sequence[Sequence[str]], right: str = "") -> str:
    """The rows in aligned columns, the first row as headings. `right`: headings of the columns aligned to the right."""
    rows = [[*map(printable_line, row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.rjust if heading in right.split() else str.ljust for heading in rows[0]]
    lines = ("  ".join(side(cell, w) for side, cell, w in zip(sides, row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def count_noun(n: int, noun: str) -> str:
    """ "1 tensor", "2 tensors"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def tell(text: object) -> None:
    """Print text for people on standard error. If nobody reads there any more, the work goes on in silence."""
    try:
        click.echo(printable(text), err=True)
    except BrokenPipeError:
        drop(sys.stderr)


def answer(text: object) -> bool:
    """Print a result on standard output, as it is; False if nobody reads there any more."""
    try:
        click.echo(text)
    except BrokenPipeError:
        drop(sys.stdout)
        return False
    return True


def drop(stream: TextIO) -> None:
    """Lead a stream whose reader has gone to nowhere: its buffer is written once more when Python ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
