"""The one rule of repeated commands for files: the same request again ends with "already there", another is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.store.places import OVERWRITE


def is_repeated(file: Path | None, differences: Callable[[Path], list[str]], *, overwrite: bool) -> bool:
    """True if the file exists and comes from the same request; False if it has yet to be written.

    differences: from the file to the names of the parts of its header that another request made. Raises PlanError if
    there are some and the file may not be overwritten.
    """
    if file is None or not file.is_file():
        return False
    try:
        differing = differences(file)
    except FormatError:
        differing = ["it is not a complete file of this kind"]
    if differing and not overwrite:
        raise PlanError(
            "{place} exists and differs: {found}; {cure}", place=file, found=", ".join(differing), cure=OVERWRITE
        )
    return not differing
