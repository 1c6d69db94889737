"""Push a saved model to the Hub: in one commit or not at all, and then compare the commit with the local files.

A user's own files in the repository are kept: a card edited there, and weights not from an earlier push.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

import xxhash
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.machine.secrets import mask_secrets
from mergekit_lfm.output.card import CARD, OWN_CARD, without_front_matter
from mergekit_lfm.output.lock import LOCK, lock_of, verify
from mergekit_lfm.output.outgoing import IN_USE, WEIGHTS, Pushed, outgoing
from mergekit_lfm.store.files import name_file, open_file, parse_json, read_bytes, read_text
from mergekit_lfm.store.hub import repository
from mergekit_lfm.store.hub.client import (
    HTTPError,
    api,
    endpoint,
    how_to_sign_in,
    offline,
    offline_variable,
    translate_errors,
)
from mergekit_lfm.store.hub.requests import list_files
from mergekit_lfm.store.hub.snapshots import HubSnapshot, ListedDigest, pull
from mergekit_lfm.version import __version__

Content = Path | bytes  # of a file to push
IN_GIT = 100_000_000  # bytes; the Hub takes no larger file into git itself (its limit is a tenth of that)


@dataclass(frozen=True)
class Remote:
    """The current state of a repository: its newest commit, or None if it does not exist yet, and its files there."""

    repo: str
    commit: str | None = None
    private: bool = False
    files: Mapping[str, RepoFile] = field(default_factory=dict)


def check_repository(repo: str, *, private: bool = False, overwrite: bool = False) -> Remote:
    """The repository's state, after checking everything that can be known before a push. Changes nothing.

    private: it must be private. overwrite: it may hold weights that are not of a merge. Raises PlanError if a push
    would be refused.
    """
    try:
        repository(repo)
    except ValueError as wrong:
        raise PlanError(f"push: {wrong}") from None
    if offline():
        raise PlanError(f"{repo} cannot be pushed to while {offline_variable()} is set: unset it")
    _check_account(repo)
    return _check_suitable(_look(repo), private=private, overwrite=overwrite)


def _check_suitable(remote: Remote, *, private: bool, overwrite: bool) -> Remote:
    """The repository, if pushing to it is allowed; else raises PlanError."""
    repo = remote.repo
    if remote.commit is not None and private and not remote.private:
        raise PlanError(
            f"{repo} exists and is public, but you asked for a private repository: make it private at "
            f"{endpoint()}/{repo}/settings, or push to another name"
        )
    used = sorted(name for name in remote.files if IN_USE.search(name))
    if used and LOCK not in remote.files and not overwrite:
        raise PlanError(
            f"{repo} holds {used[0]}, which is not from an earlier push of a merge: push to another name, or replace "
            "it with `mergekit-lfm push DIR REPO --overwrite`"
        )
    return remote


def _check_account(repo: str) -> None:
    """Raises PlanError if the token is missing, invalid or read-only, or its account may not push to that owner."""
    if get_token() is None:
        raise PlanError(f"found no token to push with: {how_to_sign_in()}")
    with translate_errors(repo):
        account = api().whoami()
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise PlanError("the token may only read: push with one of the role `write`")
    names = [account["name"], *(org["name"] for org in account.get("orgs") or [])]
    owner = repo.partition("/")[0]
    if role != "fineGrained" and owner.lower() not in map(str.lower, names):  # such a token may name organisations
        raise PlanError(f"the token is of {account['name']}, who may push to {', '.join(names)}, but not to {owner}")


def _look(repo: str, revision: str | None = None) -> Remote:
    with translate_errors(repo):
        try:
            info = api().model_info(repo, revision=revision)
        except RepositoryNotFoundError:
            return Remote(repo)
        return Remote(repo, info.sha, bool(info.private), list_files(repo, str(info.sha)))


def push(
    folder: str | PathLike[str],
    repo: str,
    *,
    private: bool = False,
    overwrite: bool = False,
    replace_card: bool = False,
    message: str | None = None,
    pull_back: bool = False,
    progress: Progress = SILENCE,
) -> Pushed:
    """Push a saved model in a folder to a repository on the Hub in one commit; creates the repository if missing.

    Deletes files of an earlier push that the folder no longer has. Keeps a card edited on the Hub, unless replace_card,
    and puts ours into MERGE.md. pull_back: download the pushed model again and compare it with its lock. The token is
    HF_TOKEN or that of `hf auth login`. Raises FormatError if the folder holds no complete model, PlanError if anything
    forbids the push, before sending anything if it can be known then; ConnectionError if the connection fails, which
    leaves the repository as it was.
    """
    going = outgoing(folder, pull_back=pull_back)
    source, contents = going.folder, dict[str, Content](going.contents)
    if message is not None and mask_secrets(message) != message:
        raise PlanError("the commit's message holds a token or a key, and everybody could read it: leave that out")
    remote = check_repository(repo, private=private, overwrite=overwrite)
    kept = not replace_card and _card_kept(remote, source)
    if kept:
        contents[OWN_CARD] = without_front_matter(read_text(source / CARD)).encode()
        del contents[CARD]
    if remote.commit is None:
        with translate_errors(repo):
            api().create_repo(repo, private=private or None, exist_ok=True)
        remote = _check_suitable(_look(repo), private=private, overwrite=overwrite)
    oids = {name: _oids(content) for name, content in contents.items()}
    changed = [name for name in contents if not _matches(remote.files.get(name), oids[name])]
    removed = sorted(_outdated(remote, kept) - contents.keys())
    commit = remote.commit
    if changed or removed:
        with name_file(source):  # the client does not say which file it cannot read
            new = {name: contents[name] for name in changed}
            commit = _commit(remote, new, removed, message or _message(source), progress)
        _compare(repo, commit, oids, removed)
    assert commit is not None
    if pull_back:
        _pull_back(_look(repo, commit), contents, source.resolve().parent)
    nbytes = sum(_nbytes(contents[name]) for name in changed)
    return Pushed(repo, commit, tuple(changed), tuple(removed), nbytes, kept, going.left_out, pull_back)


def _card_kept(remote: Remote, folder: Path) -> bool:
    """True if the card on the Hub differs from ours and from that of the last push."""
    if CARD not in remote.files or not (folder / CARD).exists():
        return False
    theirs = _read(remote, CARD)
    if theirs == read_bytes(folder / CARD):
        return False
    pushed = _lock(remote).get("files", {}).get(CARD)
    return bool(xxhash.xxh3_128_hexdigest(theirs) != pushed)


def _lock(remote: Remote) -> dict[str, dict[str, str]]:
    """The lock of the last pushed merge; {} without a readable one."""
    if LOCK not in remote.files:
        return {}
    try:
        lock = parse_json(_read(remote, LOCK), LOCK)
    except ValueError:
        return {}
    return lock if isinstance(lock, dict) and isinstance(lock.get("files"), dict) else {}


def _read(remote: Remote, name: str) -> bytes:
    with translate_errors(remote.repo):
        path = Path(hf_hub_download(remote.repo, name, revision=remote.commit, endpoint=endpoint()))
    digests = {name: ListedDigest.of_entry(remote.files[name])}
    HubSnapshot(remote.repo, str(remote.commit), path.parent, {}, digests).compare([name])
    return read_bytes(path)


def _outdated(remote: Remote, kept_card: bool) -> set[str]:
    """The files of the repository that a new push replaces: weights, and files of an earlier push."""
    lock = _lock(remote)
    shards = headers if isinstance(headers := lock.get("headers"), dict) else {}
    ours = {*lock["files"], *shards, LOCK, *(() if kept_card else (OWN_CARD,))} if lock else set()
    return {name for name in remote.files if name in ours or WEIGHTS.search(name)} - {CARD}


def _message(folder: Path) -> str:
    method = lock_of(folder).get("recipe", {}).get("merge_method")
    return f"{f'Merge by {method}' if method else 'Model'}, with mergekit_lfm {__version__}"


def _nbytes(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _oids(content: Content) -> tuple[str, str]:
    """The Hub's ids for this content: sha256 if it is stored outside git, git's sha1 if inside ("" if too large)."""
    if _nbytes(content) > IN_GIT:
        assert isinstance(content, Path)
        with open_file(content) as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), ""
    data = content if isinstance(content, bytes) else read_bytes(content, IN_GIT)
    return hashlib.sha256(data).hexdigest(), hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _matches(file: RepoFile | None, oids: tuple[str, str]) -> bool:
    """True if a file on the Hub has the content with these ids."""
    if file is None:
        return False
    return bool(file.blob_id == oids[1] if file.lfs is None else file.lfs.sha256 == oids[0])


def _commit(
    remote: Remote, contents: Mapping[str, Content], removed: list[str], message: str, progress: Progress
) -> str:
    """Commit on top of the commit that was checked, or fail; returns the new commit."""
    additions = [_addition(name, content) for name, content in contents.items()]
    deletions = [CommitOperationDelete(name, is_folder=False) for name in removed]
    with translate_errors(remote.repo):
        try:
            _send_large(remote.repo, additions, progress)
            done = api().create_commit(
                remote.repo, [*additions, *deletions], commit_message=message, parent_commit=remote.commit
            )
        except HTTPError:
            raise
        except json.JSONDecodeError:
            raise ConnectionError(f"the Hub at {endpoint()} gave an unreadable answer; try again") from None
        except ValueError as error:  # the Hub does not accept the model card
            raise PlanError(f"{remote.repo}: {error}") from None
    return str(done.oid)


def _addition(name: str, content: Content) -> CommitOperationAdd:
    """A file to commit; the client reads it for its digest."""
    if isinstance(content, bytes):
        return CommitOperationAdd(name, content)
    with name_file(content):
        return CommitOperationAdd(name, str(content))


def _send_large(repo: str, additions: Sequence[CommitOperationAdd], progress: Progress) -> None:
    """Send the files that are stored outside git one by one before the commit, which then has to name them only."""
    large = [addition for addition in additions if addition.upload_info.size > IN_GIT]
    with progress.by_bytes(
        sum(addition.upload_info.size for addition in large), f"pushing to {repo}", bar=False
    ) as advance:
        for addition in large:
            api().preupload_lfs_files(repo, [addition], free_memory=False)
            advance(addition.upload_info.size)


def _compare(repo: str, commit: str, oids: Mapping[str, tuple[str, str]], removed: list[str]) -> None:
    """Raises ConnectionError if the commit differs from the pushed files."""
    files = _look(repo, commit).files
    wrong = [name for name in oids if not _matches(files.get(name), oids[name])] + [n for n in removed if n in files]
    if wrong:
        raise ConnectionError(f"{repo}@{commit}: on the Hub, {', '.join(wrong)} differ from the pushed files")


def _pull_back(remote: Remote, pushed: Iterable[str], near: Path) -> None:
    """Download the pushed model past the cache and compare it with its lock. Raises PlanError if a byte differs."""
    assert remote.commit is not None
    with TemporaryDirectory(prefix="pulled-", dir=near) as folder:
        copy = Path(folder)
        sizes = {name: remote.files[name].size for name in pushed}
        pull(HubSnapshot(remote.repo, remote.commit, copy, sizes), copy)
        problems = [
            line for line in verify(copy, alone=False) if CARD in sizes or not line.startswith(f"{CARD} ")
        ]  # a kept one
    if problems:
        summary = f"{remote.repo}@{remote.commit} was pushed, but downloaded again it differs from its lock:\n  "
        raise PlanError(summary + "\n  ".join(problems[:10]))
