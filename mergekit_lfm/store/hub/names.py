"""What a model on the Hub is called: org/name, with @ and a branch, tag or commit where it is not the newest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePath

_PART = r"[A-Za-z0-9_](?:[\w.-]*[\w])?"
_NAME = re.compile(rf"(?:(?P<owner>{_PART})/)?(?P<name>{_PART})(?:@(?P<revision>[\w][\w./-]*))?", re.ASCII)
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".yaml", ".yml", ".json", ".jsonl", ".txt")


@dataclass(frozen=True, slots=True)
class HubName:
    """A model on the Hub, at a revision: a branch, a tag, a commit, or None, the newest on the main branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def repository(text: str) -> str:
    """`text`, the name of a repository to push to. ValueError where it is none."""
    name = hub_name(text)
    if name is None or name.revision is not None or "/" not in name.repo:
        raise ValueError(f"found {text!r}, expected a repository on the Hub as org/name, or user/name")
    return name.repo


def called(folder: Path) -> str:
    """What a folder is called in what is printed: in the cache of the Hub, its model's name and commit."""
    found = re.search(r"/models--([^/]+)/snapshots/(\w{40})$", folder.as_posix())
    return f"{found[1].replace('--', '/')}@{found[2]}" if found else str(folder)


def hub_name(text: str) -> HubName | None:
    """The model that `org/name`, `org/name@revision` or `name@revision` stands for; None where it can be none.

    A name alone is none: it is a folder's as a rule, and on the Hub only a few old models have no owner.
    """
    found = _NAME.fullmatch(text)
    if found is None or PurePath(found["name"]).suffix in _FILES:
        return None
    parts = [part for part in (found["owner"], found["name"]) if part is not None]
    if any(len(part) > 96 or ".." in part or "--" in part or part.endswith(".git") for part in parts):
        return None
    if len(parts) == 1 and found["revision"] is None:
        return None
    return HubName("/".join(parts), found["revision"])
