"""How workflows read the paths and sizes that they are given."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.machine.sizes import parse_size
from mergekit_lfm.recipe.files import is_adapted, with_folders
from mergekit_lfm.store.elsewhere import name_elsewhere, nearest

StrPath = str | PathLike[str]


def as_bytes(size: int | str | None) -> int | None:
    """The number of bytes in a size such as "4GB"."""
    return parse_size(size) if isinstance(size, str) else size


def expand(path: StrPath, label: str = "output") -> Path:
    """The path, "~" replaced by the home folder. Raises PlanError for an address in a bucket, where no folder is."""
    if re.match(r"(s3|gs|az):/", str(path)) and not Path(path).exists():
        wrong = nearest(str(path)) if name_elsewhere(str(path)) is None else ""
        sentence = "{label}: found {found}, expected a folder of this machine{wrong}"
        raise PlanError(sentence, label=label, found=repr(str(path)), wrong=wrong)
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise PlanError(f"{label}: found {str(path)!r}, which names nobody's home; write the path in full") from None


def model_folder(model: StrPath, progress: Progress = SILENCE) -> Path:
    """The folder of a model; one that is elsewhere is downloaded to the cache.

    A folder wins over a model on the Hub of the same name. For a text MODEL+ADAPTER the result is such a text, with
    folders. Raises ConnectionError if the Hub, or the bucket, cannot be reached.
    """
    if is_adapted(model):
        from mergekit_lfm.store.sidecars import download

        return Path(with_folders(str(model), lambda name, adapter: download(name, progress, adapter=adapter)))
    name = None if Path(model).exists() else name_elsewhere(str(model))
    folder = Path(model) if name is not None else expand(model, "model")
    if name is None:
        hint = "" if folder.exists() else nearest(str(model))
        if hint and "/" in str(model):
            raise PlanError(f"found {str(model)!r}, but there is no such folder{hint}")
        return folder
    from mergekit_lfm.store.sidecars import download

    return download(name, progress)
