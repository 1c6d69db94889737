"""Decide where an output may be written: the one answer for every command and function.

A folder or file may be written at a free path, over an empty folder, or over an earlier output with --overwrite
(`output/replace.py`); never through a link, over an input, into one, or around one. Missing parent folders are made
when it is written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from mergekit_lfm.errors import PlanError

# Sentences of refusals, and what to do.
IS = "{place} is {found}, expected {expected}; {cure}"
EXISTS = "{place} exists; {cure}"
ANOTHER = "choose another output"
OVERWRITE = "choose another output, or use --overwrite"


def check_file(out: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Raise PlanError if a new file must not go to `out`. inputs: the paths that are read."""
    check_outside(out, inputs)
    place = out.resolve()
    if place.is_dir():
        raise PlanError(
            IS, place=out, found="a folder", expected="the name of a file to write", cure="choose a name in it"
        )
    if place.exists() and not place.is_file():
        raise PlanError(IS, place=out, found="not a file", expected="the name of one to write", cure=ANOTHER)
    if out.exists() and not overwrite:
        raise PlanError(EXISTS, place=out, cure=OVERWRITE)
    parent = next(folder for folder in place.parents if folder.exists())
    if not parent.is_dir():
        expected = f"a folder to write {out.name} in"
        raise PlanError(IS, place=parent, found="a file", expected=expected, cure=ANOTHER)
    if not os.access(parent, os.W_OK):
        raise PlanError("the folder {place} cannot be written in; {cure}", place=parent, cure=ANOTHER)


def check_apart(out: Path, inputs: Mapping[str, Path]) -> None:
    """Raise PlanError if the folder `out`, or its OUT.partial, is an input, lies in one, or contains one."""
    for label, path in inputs.items():
        home = path.resolve()
        for place in (out.resolve(), partial_of(out.resolve())):
            if home.is_relative_to(place) or place.is_relative_to(home):
                sentence = "the output {place} and the input {label} lie in one another; {cure}"
                raise PlanError(sentence, place=place, label=label, cure=ANOTHER)


def check_outside(out: Path, inputs: Iterable[Path]) -> None:
    """Raise PlanError if the file `out` is an input, or lies in the folder of one."""
    place = out.resolve()
    for path in inputs:
        home = path.resolve()
        if place == home or (home.is_dir() and place.is_relative_to(home)):
            sentence = "the output {place} lies in the input {path}, which is only read; {cure}"
            raise PlanError(sentence, place=out, path=path, cure=ANOTHER)


def check_kind(out: Path) -> None:
    """Raise PlanError if `out` exists and is not a folder, or if it or OUT.partial is a link."""
    for place in (out, partial_of(out)):
        if place.is_symlink():
            found, expected = f"a link to {place.readlink()}", "a folder to create"
            raise PlanError(IS, place=place, found=found, expected=expected, cure="name that itself")
    if out.exists() and not out.is_dir():
        raise PlanError(IS, place=out, found="a file", expected="a folder to create", cure=ANOTHER)


def place_of(out: Path) -> Path:
    """The absolute path of an output; links are followed but for the last part of the path."""
    return out.parent.resolve() / out.name if out.name not in ("", "..") else out.resolve()


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raise PlanError if one of these files in a folder, or a folder on the way to it, is a link.

    Writing the file would write somewhere else.
    """
    ways = [(Path(name), *Path(name).parents[:-1]) for name in names]
    for path in (folder / part for way in ways for part in way):
        if path.is_symlink():
            raise PlanError(f"{path} is a link to {path.readlink()}, and would be written through; move {folder} away")


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder with all that is in it; never what a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def has_files(folder: Path) -> bool:
    """True if the folder exists and is not empty."""
    return folder.is_dir() and any(folder.iterdir())


def partial_of(out: Path) -> Path:
    """The folder OUT.partial, which becomes OUT once it is complete."""
    return beside(out, ".partial")


def beside(out: Path, end: str) -> Path:
    """The path beside `out` whose name is that of `out` and `end`. Raises PlanError for the root of all folders."""
    named = out if out.name not in ("", "..") else out.resolve()  # "." and ".." have no name of their own
    if not named.name:
        found, expected = "the root of the file system", "a folder to create"
        raise PlanError(IS, place=named, found=found, expected=expected, cure=ANOTHER)
    return named.with_name(f"{named.name}{end}")
