"""A Hub on this machine, for tests: it serves models to the real client over HTTP, and fails on request.

Large files are stored as by git-lfs or, with xet=True, by the client's xet in a folder. It answers the requests that
the client was seen to make, with the Hub's errors.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_store import Blob, Commit, Refused, Repo, Store, card_problems, is_apart, listing

TOKEN = "hf_" + "a" * 34  # of the user "me", a member of "org"
READ_TOKEN = "hf_" + "r" * 34  # a token of the same user that may only read
USER, ORG = "me", "org"
PART = 1 << 16


@dataclass(frozen=True)
class Request:
    """An answered request. token: the token that it was sent with, or None."""

    method: str
    path: str
    status: int
    body_bytes: int
    token: str | None
    host: str


@dataclass
class Fault:
    """A fault of the next requests of a kind, in place of an answer or before it."""

    method: str
    path: str
    status: int | None
    headers: Mapping[str, str]
    cut_after: int | None
    times: int | None
    body: bytes | None
    before: Callable[[], object] | None


class HubServer:
    """The server, a context manager, with methods by which tests change its contents and behaviour."""

    def __init__(self, folder: Path, *, xet: bool = False, token: str = TOKEN) -> None:
        self.store, self.xet, self.token = Store(folder), xet, token
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.multipart_over, self.part_size, self.page = 5_000_000, 5_000_000, 1000
        self.connections: set[socket.socket] = set()
        self._lock = Lock()

    def __enter__(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = False
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        for connection in list(self.connections):  # clients keep theirs open
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._http.server_close()  # waits for the threads that served them

    # ---------------------------------------------------------------- contents, for tests

    def create(self, repo: str, files: Mapping[str, bytes] | None = None, *, private: bool = False) -> str:
        """Make a repository with these files; its newest commit."""
        self.store.repos[repo] = Repo(private=private)
        return self.commit(repo, {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})}, "initial commit")

    def commit(
        self, repo: str, files: Mapping[str, bytes | None], message: str = "Update", branch: str = "main"
    ) -> str:
        """A commit by somebody else; None deletes a file."""
        changes = {path: None if data is None else self.store.file(path, data) for path, data in files.items()}
        return self.store.commit(repo, branch, message, changes).sha

    def tag(self, repo: str, name: str, sha: str) -> None:
        """Make a tag, or move it."""
        self.store.repo(repo).refs[name] = sha

    def gate(self, repo: str) -> None:
        """Let nobody read the repository's files any more."""
        self.store.repo(repo).gated = True

    def revision(self, repo: str, revision: str) -> str:
        """The commit that a branch, tag or commit stands for."""
        return self.store.resolve(repo, revision).sha

    def head(self, repo: str) -> str:
        """The newest commit."""
        return self.revision(repo, "main")

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """All files of a commit that are stored here."""
        return {path: self.content(blob) for path, blob in self.store.resolve(repo, revision).tree.items()}

    def content(self, blob: Blob) -> bytes:
        """A file's content; asks xet for the content that xet holds."""
        kept = self.store.blobs / blob.sha256
        if kept.exists():
            return kept.read_bytes()
        from hf_xet import XetFileInfo, XetSession

        target = kept.with_suffix(".tmp")
        with XetSession().new_file_download_group(endpoint=f"local://{self.store.cas}") as group:
            group.start_download_file(XetFileInfo(self.store.by_xet()[blob.sha256], blob.size), str(target))
        target.rename(kept)
        return kept.read_bytes()

    def history(self, repo: str) -> list[Commit]:
        """The commits of the main branch, the newest first."""
        found, sha = [], self.head(repo)
        while sha:
            found.append(self.store.repo(repo).commits[sha])
            sha = found[-1].parent
        return found

    def exists(self, repo: str) -> bool:
        """True if there is such a repository."""
        return repo in self.store.repos

    def private(self, repo: str) -> bool:
        """True if it is private."""
        return self.store.repo(repo).private

    # ---------------------------------------------------------------- faults, for tests

    def fault(
        self,
        method: str,
        path: str,
        *,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        cut_after: int | None = None,
        times: int | None = 1,
        body: bytes | None = None,
        before: Callable[[], object] | None = None,
    ) -> None:
        """Let the next `times` requests (None: all) of the method whose path has the pattern `path` fail.

        They are answered with `status`, `headers` and `body`, by default that of an error; or the connection is cut
        after so many bytes of the body were received (PUT, POST) or sent (GET); or `before` is called, and then they
        are answered as usual.
        """
        self.faults.append(Fault(method, path, status, headers or {}, cut_after, times, body, before))

    def clear_faults(self) -> None:
        """Let everything go well from now on."""
        self.faults.clear()

    def next_fault(self, method: str, path: str) -> Fault | None:
        """The fault for this request, used up by one."""
        with self._lock:
            for fault in self.faults:
                if fault.times != 0 and fault.method == method and re.search(fault.path, path):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None


class _Cut(Exception):
    """The connection was cut on purpose."""


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
REV = r"(?P<rev>[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"/api/models/{REPO}/preupload/{REV}", "preupload"),
    ("POST", rf"/api/models/{REPO}/commit/{REV}", "make_commit"),
    ("GET", rf"/api/models/{REPO}/xet-(?P<kind>read|write)-token/{REV}", "xet_token"),
    ("GET", rf"/api/models/{REPO}(/revision/{REV})?", "info"),
    ("GET", rf"/api/models/{REPO}/tree/{REV}(/(?P<path>.*))?", "tree"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<sha>\w+)(/(?P<part>\d+))?", "lfs_put"),
    ("POST", r"/lfs/(?P<sha>\w+)/complete", "lfs_complete"),
    ("POST", r"/lfs/verify", "lfs_verify"),
    ("GET", r"/blob/(?P<sha>\w+)", "blob"),
    ("GET", rf"/{REPO}/resolve/{REV}/(?P<path>.+)", "resolve"),
    ("HEAD", rf"/{REPO}/resolve/{REV}/(?P<path>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def handle(self) -> None:
        with suppress(ConnectionError):
            super().handle()

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.query = parse_qs(urlsplit(self.path).query)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.status, self.got = 0, 0
        self.fault = self.hub.next_fault(self.command, path)
        try:
            self._serve(path)
        except Refused as refused:
            self._send(refused.status, {"error": refused.message}, refused.headers)
        except (_Cut, BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            if not self.status:
                self._record()
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def _record(self) -> None:
        """Record the request before its answer goes out, so that a client with the answer finds it recorded."""
        path, host = unquote(urlsplit(self.path).path), self.headers.get("Host", "").partition(":")[0]
        self.hub.requests.append(Request(self.command, path, self.status, self.got, self.token, host))

    def _serve(self, path: str) -> None:
        fault = self.fault
        if fault is not None and fault.cut_after is not None and self.command in ("PUT", "POST"):
            self._read(fault.cut_after)
            raise _Cut
        self.body = self._read()
        if fault is not None and fault.before is not None:
            fault.before()
        if fault is not None and fault.status is not None and fault.body is not None:
            self._send(fault.status, fault.body, fault.headers)
            return
        if fault is not None and fault.status is not None:
            message = fault.headers.get("X-Error-Message", "as the test wants it")
            raise Refused(fault.status, message, **dict(fault.headers))
        if self.token not in (None, self.hub.token, READ_TOKEN):
            raise Refused(401, "Invalid credentials in Authorization header")
        for method, pattern, name in ROUTES:
            found = re.fullmatch(pattern, path)
            if method == self.command and found:
                getattr(self, name)(**{key: value for key, value in found.groupdict().items() if value is not None})
                return
        raise Refused(404, f"there is no {self.command} {path} here")

    def _read(self, limit: int | None = None) -> bytes:
        """The body, or its first bytes; of the stated length, or in chunks."""
        found = bytearray()
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                found += self.rfile.read(size)
                self.rfile.readline()
                if limit is not None and len(found) >= limit:
                    break
            else:
                self.rfile.readline()
        else:
            whole = int(self.headers.get("Content-Length") or 0)
            found += self.rfile.read(whole if limit is None else min(limit, whole))
            if limit is None and len(found) < whole:  # the client was killed
                raise _Cut
        self.got = len(found)
        return bytes(found)

    def _send(self, status: int, body: Any = b"", headers: Mapping[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Length": str(len(data)), **(headers or {})}
        self.status = status
        self._record()
        self.send_response_only(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            cut = None if self.fault is None or self.command != "GET" else self.fault.cut_after
            self.wfile.write(data if cut is None else data[:cut])
            self.wfile.flush()
            if cut is not None and cut < len(data):
                raise _Cut

    def _json(self) -> Any:
        return json.loads(self.body)

    # ---------------------------------------------------------------- permissions

    def _may_read(self, repo: str, *, files: bool = True) -> None:
        held = self.hub.store.repos.get(repo)
        if held is None or (held.private and self.token is None):
            raise Refused(401 if self.token is None else 404, "Repository not found", "RepoNotFound")
        if held.gated and files:
            raise Refused(403, f"Access to model {repo} is restricted and you are not in the list.", "GatedRepo")

    def _may_write(self, owner: str) -> None:
        if self.token is None:
            raise Refused(401, "Invalid username or password.")
        if self.token == READ_TOKEN or owner not in (USER, ORG):
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')

    def whoami(self) -> None:
        if self.token is None:
            raise Refused(401, "Invalid username or password.")
        role = "read" if self.token == READ_TOKEN else "write"
        orgs = [{"type": "org", "name": ORG, "roleInOrg": "write"}]
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        self._send(200, {"type": "user", "name": USER, "orgs": orgs, "auth": auth})

    # ---------------------------------------------------------------- repositories

    def create_repo(self) -> None:
        asked = self._json()
        owner = asked.get("organization") or USER
        repo = f"{owner}/{asked['name']}"
        self._may_write(owner)
        if self.hub.exists(repo):
            self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"})
            return
        self.hub.create(repo, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self._send(200, {"url": f"{self.hub.url}/{repo}", "name": repo})

    def info(self, repo: str, rev: str = "main") -> None:
        self._may_read(repo, files=False)
        held, commit = self.hub.store.repo(repo), self.hub.store.resolve(repo, rev)
        self._send(
            200,
            {
                "_id": repo,
                "id": repo,
                "modelId": repo,
                "sha": commit.sha,
                "private": held.private,
                "gated": "manual" if held.gated else False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in sorted(commit.tree)],
            },
        )

    def tree(self, repo: str, rev: str, path: str = "") -> None:
        self._may_read(repo, files=False)
        commit = self.hub.store.resolve(repo, rev)
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("1", "true")
        known = self.hub.store.by_xet() if self.hub.xet else {}
        entries = listing(commit, f"{path}/" if path else "", known, recursive=recursive)
        start = int(self.query.get("cursor", ["0"])[0])
        stop = start + self.hub.page
        headers = {}
        if stop < len(entries):
            place = f"{self.hub.url}{quote(urlsplit(self.path).path)}?recursive={recursive}&cursor={stop}"
            headers = {"Link": f'<{place}>; rel="next"'}
        self._send(200, entries[start:stop], headers)

    # ---------------------------------------------------------------- downloads

    def resolve(self, repo: str, rev: str, path: str) -> None:
        self._may_read(repo)
        commit, blob = self.hub.store.blob(repo, rev, path)
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if not blob.apart:
            self._send_range(self.hub.content(blob), headers)
            return
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        headers["Location"] = f"http://localhost:{self.hub.port}/blob/{blob.sha256}?Signature=secret"
        if self.hub.xet and (xet_hash := self.hub.store.by_xet().get(blob.sha256)):
            token = f"{self.hub.url}/api/models/{repo}/xet-read-token/{commit.sha}"
            headers |= {"X-Xet-Hash": xet_hash, "Link": f'<{token}>; rel="xet-auth"'}
        self._send(302, b"", headers)

    def blob(self, sha: str) -> None:
        kept = self.hub.store.blobs / sha
        data = kept.read_bytes() if kept.exists() else self.hub.content(Blob(sha, self._size(sha), "", True))
        self._send_range(data, {"ETag": f'"{sha}"', "Accept-Ranges": "bytes"})

    def _size(self, sha: str) -> int:
        commits = (c for repo in self.hub.store.repos.values() for c in repo.commits.values())
        return next(blob.size for c in commits for blob in c.tree.values() if blob.sha256 == sha)

    def _send_range(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            self._send(200, data, headers)
            return
        start, stop = int(wanted[1]), min(len(data), int(wanted[2] or len(data)) + 1)
        if start >= len(data):
            raise Refused(416, "out of range", **{"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self._send(206, data[start:stop], headers)

    # ---------------------------------------------------------------- uploads

    def validate_yaml(self) -> None:
        problems = card_problems(self._json()["content"])
        self._send(400 if problems else 200, {"errors": [{"message": text} for text in problems], "warnings": []})

    def preupload(self, repo: str, rev: str) -> None:
        self._may_write(repo.partition("/")[0])
        tree = self.hub.store.resolve(repo, rev).tree
        files = []
        for file in self._json()["files"]:
            path, there = file["path"], tree.get(file["path"])
            mode = "lfs" if is_apart(path, file["size"]) else "regular"
            oid = {} if there is None else {"oid": there.sha256 if there.apart else there.oid}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        self._send(200, {"files": files})

    def lfs_batch(self, repo: str) -> None:
        self._may_write(repo.partition("/")[0])
        found = []
        for held in self._json()["objects"]:
            sha, size = held["oid"], held["size"]
            actions: dict[str, Any] = {}
            if not self.hub.store.has(sha):
                place = f"{self.hub.url}/lfs/{sha}"
                upload: dict[str, Any] = {"href": f"{place}?Signature=secret"}
                if size > self.hub.multipart_over:
                    parts = range(1, -(-size // self.hub.part_size) + 1)
                    header = {"chunk_size": str(self.hub.part_size), **{str(n): f"{place}/{n}" for n in parts}}
                    upload = {"href": f"{place}/complete", "header": header}
                actions = {"actions": {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/verify"}}}
            found.append({"oid": sha, "size": size, "authenticated": True, **actions})
        self._send(200, {"transfer": "basic", "objects": found})

    def lfs_put(self, sha: str, part: str = "") -> None:
        if part:
            (self.hub.store.blobs / f"{sha}.{int(part):05d}").write_bytes(self.body)
        elif self.hub.store.keep(self.body) != sha:
            raise Refused(422, "the content is not what was announced")
        self._send(200, b"", {"ETag": f'"{sha}-{part}"'})

    def lfs_complete(self, sha: str) -> None:
        parts = sorted(self.hub.store.blobs.glob(f"{sha}.*"))
        if len(parts) != len(self._json()["parts"]):
            raise Refused(400, "parts are missing")
        if self.hub.store.keep(b"".join(path.read_bytes() for path in parts)) != sha:
            raise Refused(422, "the content is not what was announced")
        for path in parts:
            path.unlink()
        self._send(200, {})

    def lfs_verify(self) -> None:
        asked = self._json()
        kept = self.hub.store.blobs / asked["oid"]
        if not kept.exists() or kept.stat().st_size != asked["size"]:
            raise Refused(404, "there is no such object")
        self._send(200, {})

    def xet_token(self, repo: str, rev: str, kind: str) -> None:
        if kind == "write":
            self._may_write(repo.partition("/")[0])
        self._may_read(repo)
        self.hub.store.resolve(repo, rev)
        url, expires = f"local://{self.hub.store.cas}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        self._send(200, {"casUrl": url, "accessToken": "xet", "exp": expires}, headers)

    def make_commit(self, repo: str, rev: str) -> None:
        self._may_write(repo.partition("/")[0])
        header, *lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        changes, asked = self.hub.store.changes(repo, rev, lines), header["value"]
        commit = self.hub.store.commit(repo, rev, asked["summary"], changes, asked.get("parentCommit"))
        self._send(200, {"commitOid": commit.sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit.sha}"})
