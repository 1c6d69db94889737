"""A saved model pushed to the Hub: in one commit or not at all, and compared with what was meant once it is there.

What a repository holds besides is kept where it is a user's: a card that was edited there, and weights that are not of
an earlier push. Nothing that names this machine goes out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

import xxhash
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.output.card import CARD, KEPT, without_front_matter
from mergekit_lfm.output.lock import LOCK, lock_of, verify
from mergekit_lfm.output.writer import REPLACED
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.hub import repository
from mergekit_lfm.store.hub.client import HTTPError, api, asking, endpoint, offline
from mergekit_lfm.store.hub.snapshots import Snapshot, pull
from mergekit_lfm.version import __version__

IN_GIT = 100_000_000  # bytes; the Hub takes no larger file into git itself (its limit is a tenth of that)
# The weights that loaders look for, of which a repository should hold one set; and what tells that it is in use.
WEIGHTS = re.compile(r"^(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?$")
IN_USE = re.compile(r"\.(safetensors|bin|gguf|pt|pth|onnx|msgpack|h5)$|(^|/)(config|adapter_config)\.json$")
TEXTS = re.compile(r"\.(md|json|yaml|yml|txt|py|jinja)$")
VOCABULARIES = re.compile(r"(^|/)(tokenizer|vocab|merges)\.(json|txt)$")  # any text may be a token
TOKEN = re.compile(rb"\b(api_org|hf)_[A-Za-z0-9_-]{30,}")
NOTED_PATH = re.compile(rb'name_or_path"\s*:\s*"[/~]')  # where transformers once found the model
SEARCHED = 50_000_000  # bytes; larger files are no notes


@dataclass(frozen=True)
class Pushed:
    """What was pushed: the files that the commit changed and those that it deleted; none where all was there already.

    kept_card: whether a card that was edited on the Hub was kept, so that ours is MERGE.md. left_out: hidden files.
    verified: whether it was downloaded again and compared with its lock.
    """

    repo: str
    commit: str
    files: tuple[str, ...]
    removed: tuple[str, ...]
    nbytes: int
    kept_card: bool
    left_out: tuple[str, ...]
    verified: bool = False

    @property
    def url(self) -> str:
        """The address of the repository."""
        return f"{endpoint()}/{self.repo}"


@dataclass(frozen=True)
class Remote:
    """A repository as it is: its newest commit, None where there is none yet, and its files there."""

    repo: str
    commit: str | None = None
    private: bool = False
    files: Mapping[str, RepoFile] = field(default_factory=dict)


def check_repository(repo: str, *, private: bool = False, overwrite: bool = False) -> Remote:
    """The repository as it is, after all that would stop a push to it as far as it is known before. Changes nothing.

    private: it has to be. overwrite: it may hold weights that are not of a merge. PlanError says what is in the way.
    """
    try:
        repository(repo)
    except ValueError as wrong:
        raise PlanError(f"push: {wrong}") from None
    if offline():
        raise PlanError(f"{repo} cannot be pushed to while HF_HUB_OFFLINE is set: unset it")
    _check_account(repo)
    return _suitable(_look(repo), private=private, overwrite=overwrite)


def _suitable(remote: Remote, *, private: bool, overwrite: bool) -> Remote:
    """The repository, if it may be pushed to. PlanError if not."""
    repo = remote.repo
    if remote.commit is not None and private and not remote.private:
        raise PlanError(
            f"{repo} is there and is public, but a private repository was asked for: make it private at "
            f"{endpoint()}/{repo}/settings, or push to another name"
        )
    used = sorted(name for name in remote.files if IN_USE.search(name))
    if used and LOCK not in remote.files and not overwrite:
        raise PlanError(
            f"{repo} holds {used[0]}, which is not of an earlier push of a merge: push to another name, or replace it "
            "with `mergekit-lfm push DIR REPO --overwrite`"
        )
    return remote


def _check_account(repo: str) -> None:
    """PlanError where the token is none, not valid, for reading alone, or of an account without that namespace."""
    if get_token() is None:
        raise PlanError("there is no token to push with: set HF_TOKEN, or run `hf auth login`")
    with asking(repo):
        account = api().whoami()
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise PlanError("the token may only read: push with one of the role `write`")
    names = [account["name"], *(org["name"] for org in account.get("orgs") or [])]
    owner = repo.partition("/")[0]
    if role != "fineGrained" and owner.lower() not in map(str.lower, names):  # that may be for organisations by name
        raise PlanError(f"the token is of {account['name']}, who may push to {', '.join(names)}, but not to {owner}")


def _look(repo: str, revision: str | None = None) -> Remote:
    with asking(repo):
        try:
            info = api().model_info(repo, revision=revision)
        except RepositoryNotFoundError:
            return Remote(repo)
        tree = api().list_repo_tree(repo, recursive=True, revision=info.sha)
        files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        return Remote(repo, info.sha, bool(info.private), files)


def push(
    folder: str | PathLike[str],
    repo: str,
    *,
    private: bool = False,
    overwrite: bool = False,
    replace_card: bool = False,
    message: str | None = None,
    pull_back: bool = False,
) -> Pushed:
    """Push a saved model in a folder to a repository on the Hub, which is made where there is none, in one commit.

    Files of an earlier push that are no more are deleted. A card that was edited on the Hub is kept, unless
    replace_card, and ours goes to MERGE.md. pull_back: download what was pushed again and compare it with its lock.
    The token is HF_TOKEN's or that of `hf auth login`. Raises FormatError where the folder holds no whole model,
    PlanError for all that forbids the push, before anything is sent where it can be known then; ConnectionError where
    it fails on the way, which leaves the repository as it was.
    """
    place = Path(folder)
    if not place.is_dir():
        raise PlanError(f"{place} is no folder, expected that of a saved model")
    Checkpoint(place)  # no half-made output has headers that can be read
    if (place / REPLACED).exists():
        raise PlanError(f"{place} still holds what it replaced, as its merge was interrupted: run that once more")
    if pull_back and not lock_of(place):
        raise PlanError(f"{place} has no {LOCK} to compare with: push it without that")
    if pull_back and (problems := verify(place)):
        found = "\n  ".join(problems[:10])
        raise PlanError(f"{place} is not what its lock says, so it is pushed without comparing alone:\n  {found}")
    remote = check_repository(repo, private=private, overwrite=overwrite)
    contents, left_out = _contents(place)
    kept = not replace_card and _card_kept(remote, place)
    if kept:
        contents[KEPT] = without_front_matter((place / CARD).read_text(encoding="utf-8")).encode()
        del contents[CARD]
    if remote.commit is None:
        with asking(repo):
            api().create_repo(repo, private=private or None, exist_ok=True)
        remote = _suitable(_look(repo), private=private, overwrite=overwrite)
    oids = {name: _oids(content) for name, content in contents.items()}
    changed = [name for name in contents if not _is(remote.files.get(name), oids[name])]
    removed = sorted(_outdated(remote, kept) - contents.keys())
    commit = remote.commit
    if changed or removed:
        commit = _commit(remote, {name: contents[name] for name in changed}, removed, message or _message(place))
        _compare(repo, commit, oids, removed)
    assert commit is not None
    if pull_back:
        _pull_back(_look(repo, commit), contents, place.resolve().parent)
    nbytes = sum(_nbytes(contents[name]) for name in changed)
    return Pushed(repo, commit, tuple(changed), tuple(removed), nbytes, kept, tuple(left_out), pull_back)


Content = Path | bytes  # of a file to push


def _contents(folder: Path) -> tuple[dict[str, Content], list[str]]:
    """What is pushed of a folder, by name, and what is not: hidden files. PlanError about what must not go out."""
    found: dict[str, Content] = {}
    hidden, told = [], []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            hidden.append(name.as_posix())
            continue
        found[name.as_posix()] = path
        if path.stat().st_size <= SEARCHED and not VOCABULARIES.search(name.as_posix()):
            told += [f"{name}, line {line}: {what}" for line, what in _private(path)]
    if told:
        raise PlanError(several("the folder holds what must not be public", told) + "\nRemove it, then push again.")
    return found, hidden


def _private(path: Path) -> list[tuple[int, str]]:
    """The lines of a file that hold a token, or, of a text, a path of this machine."""
    home, token = os.environ.get("HOME", "").rstrip("/").encode(), (get_token() or "\0").encode()
    found, text = [], TEXTS.search(path.name)
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if TOKEN.search(line) or token in line:
            found.append((number, "a token of the Hub"))
        if text and (NOTED_PATH.search(line) or (home and home + b"/" in line)):
            found.append((number, "a path of this machine"))
    return found


def _card_kept(remote: Remote, folder: Path) -> bool:
    """Whether the card on the Hub is another than the one that an earlier push has put there."""
    if CARD not in remote.files or not (folder / CARD).exists():
        return False
    theirs = _read(remote, CARD)
    if theirs == (folder / CARD).read_bytes():
        return False
    pushed = _lock(remote).get("files", {}).get(CARD)
    return bool(xxhash.xxh3_128_hexdigest(theirs) != pushed)


def _lock(remote: Remote) -> dict[str, dict[str, str]]:
    """The lock of the merge that was pushed last; {} where there is none that can be read."""
    if LOCK not in remote.files:
        return {}
    try:
        lock = json.loads(_read(remote, LOCK))
    except ValueError:
        return {}
    return lock if isinstance(lock, dict) and isinstance(lock.get("files"), dict) else {}


def _read(remote: Remote, name: str) -> bytes:
    with asking(remote.repo):
        path = hf_hub_download(remote.repo, name, revision=remote.commit, endpoint=endpoint())
    return Path(path).read_bytes()


def _outdated(remote: Remote, kept_card: bool) -> set[str]:
    """The files of the repository that a new push replaces: weights, and what an earlier push has put there."""
    lock = _lock(remote)
    ours = {*lock["files"], LOCK, *(() if kept_card else (KEPT,))} if lock else set()
    return {name for name in remote.files if name in ours or WEIGHTS.search(name)} - {CARD}


def _message(folder: Path) -> str:
    method = lock_of(folder).get("recipe", {}).get("merge_method")
    return f"{f'Merge by {method}' if method else 'Model'}, with mergekit_lfm {__version__}"


def _nbytes(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _oids(content: Content) -> tuple[str, str]:
    """What the Hub calls a file of this content: sha256 where it is stored apart, git's sha1 where it is not."""
    if _nbytes(content) > IN_GIT:
        assert isinstance(content, Path)
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), ""
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha256(data).hexdigest(), hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _is(file: RepoFile | None, oids: tuple[str, str]) -> bool:
    """Whether a file on the Hub has the content with these names."""
    if file is None:
        return False
    return bool(file.blob_id == oids[1] if file.lfs is None else file.lfs.sha256 == oids[0])


def _commit(remote: Remote, contents: Mapping[str, Content], removed: list[str], message: str) -> str:
    """The commit, onto the one that the repository was looked at, or none."""
    additions = [CommitOperationAdd(name, x if isinstance(x, bytes) else str(x)) for name, x in contents.items()]
    deletions = [CommitOperationDelete(name, is_folder=False) for name in removed]
    with asking(remote.repo):
        try:
            done = api().create_commit(
                remote.repo, [*additions, *deletions], commit_message=message, parent_commit=remote.commit
            )
        except HTTPError:
            raise
        except json.JSONDecodeError:
            raise ConnectionError(f"the Hub at {endpoint()} gives no answer that can be read; try again") from None
        except ValueError as error:  # of a model card that the Hub does not accept
            raise PlanError(f"{remote.repo}: {error}") from None
    return str(done.oid)


def _compare(repo: str, commit: str, oids: Mapping[str, tuple[str, str]], removed: list[str]) -> None:
    """ConnectionError where the commit holds anything but what was pushed."""
    there = _look(repo, commit).files
    wrong = [name for name in oids if not _is(there.get(name), oids[name])] + [n for n in removed if n in there]
    if wrong:
        raise ConnectionError(f"{repo}@{commit}: what the Hub holds of {', '.join(wrong)} is not what was pushed")


def _pull_back(remote: Remote, pushed: Iterable[str], near: Path) -> None:
    """Download what was pushed past the cache and compare every byte with its lock. PlanError where one differs."""
    assert remote.commit is not None
    with TemporaryDirectory(prefix="pulled-", dir=near) as folder:
        place = Path(folder)
        sizes = {name: remote.files[name].size for name in pushed}
        pull(Snapshot(remote.repo, remote.commit, place, sizes), place)
        problems = [line for line in verify(place) if CARD in sizes or not line.startswith(f"{CARD} ")]  # a kept one
    if problems:
        what = f"{remote.repo}@{remote.commit} was pushed, but downloaded again it is not what its lock says:\n  "
        raise PlanError(what + "\n  ".join(problems[:10]))
