"""What an output may replace: an earlier output or a saved model, and nothing else.

Everything in a folder that is replaced gets deleted. So each file in it must belong to a model that was saved there:
by its lock, or as one of the files that loaders read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.output.lock import covered_files, lock_of
from mergekit_lfm.store.folder import INDEXES, weight_paths
from mergekit_lfm.store.places import check_apart, check_kind, has_files
from mergekit_lfm.store.sidecars import SIDECAR

REPLACED = "merge.replaced"  # the folder that --overwrite replaced, in the new one until it is deleted
BESIDE = re.compile(r"^(README\.md|LICENSE(\.\w+)?|\.gitattributes|repair\.json)$")  # of a model that somebody saved
SHOWN = 5  # files that a message names


def check_folder(out: Path, inputs: Mapping[str, Path], *, overwrite: bool) -> None:
    """Raise PlanError if a new folder must not go to `out`. inputs: the paths that are read, by label."""
    check_apart(out, inputs)
    check_kind(out)
    if has_files(out):
        if not overwrite:
            raise PlanError(f"{out} exists; choose another output, or use --overwrite")
        check_replaceable(out)


def check_replaceable(out: Path) -> None:
    """Raise PlanError if the folder `out` must not be deleted with all that is in it."""
    place = out.resolve()
    for label, folder in {"the working directory": Path.cwd(), "the home directory": Path.home()}.items():
        if folder.resolve().is_relative_to(place):
            raise PlanError(f"{out} is {label} or holds it, and would be deleted; choose another output")
    foreign = sorted(name for name in _files(place) - _own_files(place) if not name.startswith(f"{REPLACED}/"))
    if foreign:
        more = f" and {len(foreign) - SHOWN} more" if len(foreign) > SHOWN else ""
        raise PlanError(
            f"{out} would be deleted with {', '.join(foreign[:SHOWN])}{more} in it, which belong to no model that was "
            "saved there; move them away, or choose another output"
        )


def _files(folder: Path) -> set[str]:
    """The names of everything in a folder, of links too, but for folders."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return {path.relative_to(folder).as_posix() for path in paths}


def _own_files(folder: Path) -> set[str]:
    """The files in a folder that belong to the model saved there, by its lock or by their names."""
    if lock_of(folder):
        try:
            return covered_files(folder)
        except FormatError:
            pass  # a damaged lock: go by the names
    names = {path.name for path in folder.iterdir() if path.is_file() and not path.is_symlink()}
    try:
        weights, _ = weight_paths(folder, names, folder)
    except FormatError:
        return set()
    own = {name for name in names if SIDECAR.search(name) or BESIDE.search(name) or name in INDEXES}
    return own | {path.relative_to(folder).as_posix() for path in weights}
