"""Names of models on the Hub: org/name, or org/name@revision for a branch, tag or commit other than the newest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePath

_PART = r"[A-Za-z0-9_](?:[\w.-]*[\w])?"
_NAME = re.compile(rf"(?:(?P<owner>{_PART})/)?(?P<name>{_PART})(?:@(?P<revision>[\w][\w./-]*))?", re.ASCII)
# Texts that people write for a name: an address in the browser, or a part of it; the folder of the Hub's cache.
_ADDRESS = re.compile(
    rf"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)?(?P<repo>{_PART}(?:/{_PART})?)"
    rf"(?:/(?:tree|blob|resolve|commit)/(?P<revision>refs/pr/\d+|[^/?#]+)[^?#]*)?/?(?:[?#].*)?",
    re.ASCII,
)
_CACHED = re.compile(r"models--(.+)")
_OTHERS = ("datasets", "spaces", "docs", "models", "collections", "papers")  # after the host, where no model is
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


def nearest_name(text: str) -> str:
    """The end of a message about a text that names no model: the form in which it would, "" if none is near."""
    name = _from_address(text) if "/" in text or text.startswith("models--") else None
    if name is not None:
        return f"; for this model on the Hub write {name}"
    if "/" in text or hub_name(f"{text}@main") is None:
        return ""
    owned = [repo for repo in _cached_repos() if repo.rpartition("/")[2] == text]
    if text in owned:
        return f"; {text} without an owner is in the cache of the Hub: write {text}@main"
    if owned:
        return f"; in the cache of the Hub is {' and '.join(sorted(owned))}: write that"
    return f"; on the Hub models are called org/name; one without an owner is written {text}@main"


def _from_address(text: str) -> HubName | None:
    """The model that an address means, or a name with too much or too little in it."""
    if (cached := _CACHED.fullmatch(text)) is not None:
        return hub_name(cached[1].replace("--", "/", 1))
    match = _ADDRESS.fullmatch(text.removesuffix(".git"))
    if match is None or match["repo"].partition("/")[0] in _OTHERS:
        return None
    repo, revision = match["repo"], match["revision"] or "main"
    return hub_name(repo if revision == "main" and "/" in repo else f"{repo}@{revision}")


def _cached_repos() -> list[str]:
    """The models in the cache of the Hub."""
    from huggingface_hub import constants

    folders = Path(constants.HF_HUB_CACHE).glob("models--*")
    return [folder.name.removeprefix("models--").replace("--", "/", 1) for folder in folders]
