"""Names of models on the Hub: org/name, or org/name@revision for a branch, tag or commit other than the newest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePath

_PART = r"[A-Za-z0-9_](?:[\w.-]*[\w])?"
_NAME = re.compile(rf"(?:(?P<owner>{_PART})/)?(?P<name>{_PART})(?:@(?P<revision>[\w][\w./-]*))?", re.ASCII)
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".tar", ".gguf", ".yaml", ".yml", ".json", ".jsonl", ".txt")


@dataclass(frozen=True, slots=True)
class HubName:
    """A model on the Hub, at a revision: a branch, a tag, a commit, or None, the newest on the main branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def repository(text: str) -> str:
    """`text`, the name of a repository to push to. Raises ValueError if it is not one."""
    name = hub_name(text)
    if name is None or name.revision is not None or "/" not in name.repo:
        raise ValueError(f"found {text!r}, expected a repository on the Hub as org/name, or user/name")
    return name.repo


def display_name(folder: Path) -> str:
    """A folder's name for messages: its path, or in the cache of the Hub its model's name and commit."""
    match = re.search(r"/models--([^/]+)/snapshots/(\w{40})$", folder.as_posix())
    return f"{match[1].replace('--', '/')}@{match[2]}" if match else str(folder)


def hub_name(text: str) -> HubName | None:
    """The model named by `org/name`, `org/name@revision` or `name@revision`; None for any other text.

    A name alone does not count: it usually means a folder, and only a few old models on the Hub have no owner.
    """
    match = _NAME.fullmatch(text)
    if match is None or PurePath(match["name"]).suffix in _FILES:
        return None
    parts = [part for part in (match["owner"], match["name"]) if part is not None]
    if any(len(part) > 96 or ".." in part or "--" in part or part.endswith(".git") for part in parts):
        return None
    if len(parts) == 1 and match["revision"] is None:
        return None
    return HubName("/".join(parts), match["revision"])
