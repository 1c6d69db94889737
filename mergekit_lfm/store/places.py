"""Where an output may be written: the one answer for every command."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from mergekit_lfm.errors import PlanError


def check_new_file(path: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """PlanError where a new file must not go there: over an input, into one's folder, over anything but a file."""
    place = path.resolve()
    for given in inputs:
        home = given.resolve()
        if place == home or (home.is_dir() and place.is_relative_to(home)):
            raise PlanError(f"the output {path} lies in the input {given}, which is only read; choose another output")
    if place.exists() and not place.is_file():
        raise PlanError(f"{path} is no file, expected the name of one to write; choose another output")
    if path.exists() and not overwrite:
        raise PlanError(f"{path} exists; choose another output, or use --overwrite")
    if not place.parent.is_dir():
        raise PlanError(f"there is no folder {path.parent} to write {path.name} in; make it, or choose another output")
    if not os.access(place.parent, os.W_OK):
        raise PlanError(f"the folder {path.parent} cannot be written in; choose another output")


def partial_of(out: Path) -> Path:
    """The folder OUT.partial, where OUT is while it is not complete."""
    named = out if out.name else out.resolve()  # "." has no name of its own
    return named.with_name(f"{named.name}.partial")
