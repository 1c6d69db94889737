"""The names that an output's documents give to its inputs, without the folders of this machine."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from itertools import count
from pathlib import PurePath


def public_names(labels: Iterable[str]) -> dict[str, str]:
    """The name of each input in an output's documents, by its label in the plan, without the folders of this machine.

    That is the label, or only its last component if it is an absolute path or leads through a parent folder. Equal
    names keep the folder that they are in ("v4/final"); where that does not tell them apart, they are numbered
    ("final", "final-2").
    """
    last = {label: last_name(label) for label in labels}
    shared = {name for name, uses in Counter(last.values()).items() if uses > 1}
    longer = {label: _with_folder(label) if name in shared and name != label else name for label, name in last.items()}
    taken = set(longer.values())
    names: dict[str, str] = {}
    for label, name in sorted(
        longer.items(), key=lambda item: item[0] != item[1]
    ):  # labels that stay as they are first
        if name in names.values():
            name = next(numbered for n in count(2) if (numbered := f"{name}-{n}") not in taken)
            taken.add(name)
        names[label] = name
    return {label: names[label] for label in last}


def _with_folder(reference: str) -> str:
    """The last two parts of a path; only the last if the folder has no name, or is the user's."""
    path = PurePath(reference)
    folder = path.parent
    nameless = folder.name in ("", "..", "~") or folder == PurePath(os.environ.get("HOME", ""))
    return path.name if nameless or folder.name.startswith("~") else f"{folder.name}/{path.name}"


def last_name(reference: str) -> str:
    """The reference, or its last part if it is an absolute path or leads through a parent folder."""
    path = PurePath(reference)
    away = path.is_absolute() or reference.startswith("~") or ".." in path.parts
    return path.name if away else reference
