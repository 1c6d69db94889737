"""A local folder behind the part of S3's protocol that reading needs: GET and HEAD with ranges, and ListObjectsV2.

Path-style addresses only: `/bucket/key` is the file `folder/bucket/key`. Signatures are not checked. A file's bytes go
from the page cache to the socket without passing through Python, so one core serves more than a fast link carries.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class LocalServer(ThreadingHTTPServer):
    """HTTP on a free port of this machine, for the length of a `with`; leaving it ends every connection and thread.

    `closing` is set first: whoever waits, waits for it, with a timeout.
    """

    daemon_threads = False  # server_close joins the threads
    request_queue_size = 256

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._accepting = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self._accepting.join()
        with self.lock:
            for connection in self._connections:
                with suppress(OSError):  # the client has left already
                    connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        with self.lock:
            self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        with self.lock:
            self._connections.discard(request)
        super().shutdown_request(request)


class LocalHandler(BaseHTTPRequestHandler):
    """Answers with keep-alive, writes no log, and ends quietly when the other side leaves."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self) -> None:
        with suppress(ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        """Send the head of an answer, and `body`, whose length it gives unless `headers` has one."""
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        """Answer with S3's error document."""
        text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'
        self.answer(status, {"Content-Type": "application/xml"}, text.encode())


class RangeServer(LocalServer):
    """S3 for reading: the buckets are the folders in `folder`.

    Each answer starts `latency_s` after its request; all connections together carry at most `bytes_per_s`.
    """

    def __init__(self, folder: Path, latency_s: float = 0.0, bytes_per_s: float | None = None) -> None:
        super().__init__(_Objects)
        self.folder, self.latency_s, self.bytes_per_s = folder.resolve(), latency_s, bytes_per_s
        self._free_at = 0.0  # the time at which the link has carried all that it was given

    def carry(self, nbytes: int) -> None:
        """Return when the link has carried so many bytes more."""
        if self.bytes_per_s is None:
            return
        with self.lock:
            self._free_at = max(self._free_at, time.monotonic()) + nbytes / self.bytes_per_s
            wait = self._free_at - time.monotonic()
        self.closing.wait(max(0.0, wait))


class _Objects(LocalHandler):
    server: RangeServer

    def do_GET(self) -> None:
        self.server.closing.wait(self.server.latency_s)
        address = urlsplit(self.path)
        bucket, _, key = unquote(address.path).lstrip("/").partition("/")
        root = self.server.folder / bucket
        path = (root / key).resolve()
        if not bucket or not root.is_dir():
            self.refuse(404, "NoSuchBucket")
        elif not key:
            self._list(root, parse_qs(address.query).get("prefix", [""])[0])
        elif not path.is_relative_to(root) or not path.is_file():
            self.refuse(404, "NoSuchKey")
        else:
            self._send(path)

    do_HEAD = do_GET

    def _list(self, root: Path, prefix: str) -> None:
        paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
        rows = [_row(key, path) for key, path in sorted(paths.items()) if key.startswith(prefix)]
        head = f"<Name>{escape(root.name)}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(rows)}</KeyCount>"
        text = f"<ListBucketResult>{head}<IsTruncated>false</IsTruncated>{''.join(rows)}</ListBucketResult>"
        self.answer(200, {"Content-Type": "application/xml"}, text.encode())

    def _send(self, path: Path) -> None:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            if self.headers.get("If-Match", "*").strip() not in ("*", _etag(info)):
                return self.refuse(412, "PreconditionFailed")
            start, stop = _span(self.headers.get("Range"), info.st_size)
            if start >= stop and "Range" in self.headers:
                return self.refuse(416, "InvalidRange")
            headers = {"Content-Length": str(stop - start), "ETag": _etag(info), "Accept-Ranges": "bytes"}
            headers["Last-Modified"] = formatdate(info.st_mtime, usegmt=True)
            if "Range" in self.headers:
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{info.st_size}"
            self.answer(206 if "Range" in self.headers else 200, headers)
            if self.command != "HEAD":
                self._pour(file.fileno(), start, stop)

    def _pour(self, source: int, start: int, stop: int) -> None:
        """Copy bytes [start, stop) of a file to the client, no faster than the link."""
        at = start
        while at < stop and not self.server.closing.is_set():
            sent = os.sendfile(self.connection.fileno(), source, at, min(1 << 20, stop - at))
            if sent == 0:  # the file has become shorter
                break
            at += sent
            self.server.carry(sent)
        self.close_connection |= at < stop


def _etag(info: os.stat_result) -> str:
    digest = hashlib.md5(f"{info.st_size} {info.st_mtime_ns}".encode(), usedforsecurity=False).hexdigest()
    return f'"{digest}"'


def _row(key: str, path: Path) -> str:
    info = path.stat()
    when = datetime.fromtimestamp(info.st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    fields = f"<Size>{info.st_size}</Size><ETag>{escape(_etag(info))}</ETag><LastModified>{when}</LastModified>"
    return f"<Contents><Key>{escape(key)}</Key>{fields}</Contents>"


def _span(text: str | None, size: int) -> tuple[int, int]:
    """The bytes [start, stop) that a Range header asks for: `bytes=a-b`, `bytes=a-` or `bytes=-n`."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", text or "bytes=0-")
    if not match or match[0] == "bytes=-":
        return 0, 0
    if not match[1]:
        return max(0, size - int(match[2])), size
    return int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
