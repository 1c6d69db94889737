"""The contents of a Hub: repositories, their commits, and the contents of files, each stored under its sha256."""

from __future__ import annotations

import base64
import hashlib
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import RLock
from typing import Any

import yaml

STORED_APART = re.compile(r"\.(safetensors|bin|pt|pth|gguf)$")
LARGE = 100_000  # bytes; a larger file is stored outside git, whatever its name


class Refused(Exception):
    """An answer with an error code. code: X-Error-Code, by which the client distinguishes errors."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {**({"X-Error-Code": code} if code else {}), "X-Error-Message": message, **headers}


@dataclass(frozen=True)
class Blob:
    """A file of a commit. apart: True if it is stored outside git, as large files are."""

    sha256: str
    size: int
    oid: str  # git's name: of the content, or of the pointer if it is stored apart
    apart: bool


@dataclass(frozen=True)
class Commit:
    """A state of a repository. parent: the sha of the one before, "" for the first."""

    sha: str
    title: str
    parent: str
    tree: Mapping[str, Blob]


@dataclass
class Repo:
    """A repository: its commits by sha, and where its branches and tags point."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)


def pointer(sha256: str, size: int) -> bytes:
    """The pointer that git holds for a file stored apart."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_oid(data: bytes) -> str:
    """The sha1 that git uses for a file of this content."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def is_apart(path: str, size: int) -> bool:
    """True if a file of this name and size is stored apart."""
    return size > 0 and (bool(STORED_APART.search(path)) or size > LARGE)


class Store:
    """All repositories. Every method may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        self.blobs, self.cas = folder / "blobs", folder / "cas"
        for place in (self.blobs, self.cas):
            place.mkdir(parents=True)
        self.repos: dict[str, Repo] = {}
        self.lock = RLock()

    def keep(self, data: bytes) -> str:
        """Store a content; returns its sha256."""
        sha256 = hashlib.sha256(data).hexdigest()
        with NamedTemporaryFile(dir=self.blobs.parent, delete=False) as file:  # others may be asking for it
            file.write(data)
        Path(file.name).replace(self.blobs / sha256)
        return sha256

    def has(self, sha256: str) -> bool:
        """True if this server or xet has the content."""
        return (self.blobs / sha256).exists() or sha256 in self.by_xet()

    def by_xet(self) -> dict[str, str]:
        """The xet hash of each content that the client's xet has stored, by sha256, from its shard files.

        A shard has a header of 48 bytes, then per file a record of its hash, flags and number of entries, the entries,
        as many verification records if a flag says so, and a record with the sha256 if another does; all of 48 bytes.
        """
        found = {}
        for path in self.cas.rglob("*.mdb"):
            data, at = path.read_bytes(), 48
            while at + 48 <= len(data) and data[at : at + 32] != b"\xff" * 32:
                digest = _hex(data[at : at + 32])
                flags, entries = struct.unpack_from("<II", data, at + 32)
                at += 48 * (1 + entries * (2 if flags & (1 << 31) else 1))
                if flags & (1 << 30):
                    found[_hex(data[at : at + 32])] = digest
                    at += 48
        return found

    def repo(self, name: str) -> Repo:
        """The repository of that name. Raises Refused without one."""
        with self.lock:
            if name not in self.repos:
                raise Refused(404, "Repository not found", "RepoNotFound")
            return self.repos[name]

    def resolve(self, name: str, revision: str) -> Commit:
        """The commit that a branch, tag or commit stands for."""
        repo = self.repo(name)
        with self.lock:
            sha = repo.refs.get(revision, revision)
            if sha not in repo.commits:
                raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return repo.commits[sha]

    def blob(self, name: str, revision: str, path: str) -> tuple[Commit, Blob]:
        """A file of a commit. Raises Refused without one."""
        commit = self.resolve(name, revision)
        if path not in commit.tree:
            raise Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.sha})
        return commit, commit.tree[path]

    def commit(
        self, name: str, branch: str, title: str, changes: Mapping[str, Blob | None], parent: str | None = None
    ) -> Commit:
        """A new commit on a branch. parent: the commit that it should follow; raises Refused if that is not the newest.

        None in place of a file deletes it.
        """
        with self.lock:
            repo = self.repo(name)
            head = repo.refs.get(branch, "")
            if parent is not None and parent != head:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            tree = dict(repo.commits[head].tree) if head else {}
            for path, blob in changes.items():
                if blob is None:
                    tree.pop(path, None)
                else:
                    tree[path] = blob
            facts = [head, title, str(len(repo.commits)), name, *(f"{p} {b.oid}" for p, b in sorted(tree.items()))]
            sha = hashlib.sha1("\n".join(facts).encode()).hexdigest()
            repo.commits[sha] = Commit(sha, title, head, tree)
            repo.refs[branch] = sha
            return repo.commits[sha]

    def changes(self, name: str, branch: str, lines: Iterable[Mapping[str, Any]]) -> dict[str, Blob | None]:
        """The changes in the lines of a commit. Raises Refused if a content or file that they name does not exist."""
        found: dict[str, Blob | None] = {}
        tree = self.resolve(name, branch).tree
        for line in lines:
            kind, value = line["key"], line["value"]
            path = value["path"]
            if kind == "file":
                data = base64.b64decode(value["content"])
                found[path] = described(self.keep(data), len(data), data)
            elif kind == "lfsFile":
                if not self.has(value["oid"]):
                    raise Refused(400, f"the content of {path} was never uploaded")
                found[path] = described(value["oid"], value["size"], None)
            elif kind in ("deletedFile", "deletedFolder"):
                gone = [
                    p for p in tree if p == path or (kind == "deletedFolder" and p.startswith(f"{path.strip('/')}/"))
                ]
                if not gone:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                found |= dict.fromkeys(gone)
            else:
                raise Refused(400, f"unknown operation {kind}")
        return found

    def file(self, path: str, data: bytes) -> Blob:
        """A file of a commit; stores its content."""
        sha256 = self.keep(data)
        return described(sha256, len(data), None if is_apart(path, len(data)) else data)


def described(sha256: str, size: int, data: bytes | None) -> Blob:
    """A file of a commit with stored content. data: the content if git itself holds it."""
    return Blob(sha256, size, git_oid(pointer(sha256, size) if data is None else data), data is None)


def _hex(digest: bytes) -> str:
    """A digest in xet's form: four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", digest))


def listing(
    commit: Commit, below: str, xet_hashes: Mapping[str, str], *, recursive: bool = True
) -> list[dict[str, Any]]:
    """The files and folders of a commit below a folder ("" or with a / at its end), as the Hub lists them."""
    found: dict[str, dict[str, Any]] = {}
    for path, blob in sorted(commit.tree.items()):
        inner = path.removeprefix(below)
        if not path.startswith(below):
            continue
        if "/" in inner:
            folder = below + inner.partition("/")[0]
            found.setdefault(folder, {"type": "directory", "path": folder, "size": 0, "oid": commit.sha})
        if recursive or "/" not in inner:
            found[path] = _entry(path, blob, xet_hashes.get(blob.sha256))
    return list(found.values())


def _entry(path: str, blob: Blob, xet_hash: str | None) -> dict[str, Any]:
    """The listing's entry for a file."""
    found: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
    if blob.apart:
        length = len(pointer(blob.sha256, blob.size))
        found["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": length}
        found |= {} if xet_hash is None else {"xetHash": xet_hash}
    return found


def card_problems(card: str) -> list[str]:
    """The Hub's complaints about the metadata of a model card."""
    front = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    try:
        data = yaml.safe_load(front[1]) if front else {}
    except yaml.YAMLError as error:
        return [str(error)]
    if not isinstance(data, dict):
        return ["the metadata is not a mapping"]
    base = data.get("base_model", [])
    return [
        f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.'
        for name in ([base] if isinstance(base, str) else base)
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)
    ]
