"""Places from which code may be loaded: nobody else can write there. The rules are those of ssh for its keys."""

from __future__ import annotations

import os
import stat
from pathlib import Path

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def make_private(folder: Path) -> str:
    """Make the folder, with the mode 0700, if it is missing; why others could write in it, "" if they cannot."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        return f"it cannot be made ({error.strerror})"
    return why_unsafe(folder)


def why_unsafe(path: Path) -> str:
    """Why others could write to a folder or file, "" if they cannot.

    It must be no link, belong to us, and be writable by us alone. The folders around it must belong to us or to root,
    and be writable by everybody only where nobody can move what belongs to others, as in /tmp.
    """
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return "it is a link"
    if status.st_uid != os.geteuid():
        return "it belongs to another user"
    if status.st_mode & OTHERS_WRITE:
        return "others may write there"
    for folder in path.resolve().parents:
        status = folder.stat()
        if status.st_uid not in (0, os.geteuid()):
            return f"{folder} belongs to another user"
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            return f"everybody may write in {folder}"
    return ""
