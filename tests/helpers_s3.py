"""An S3 server for tests, and a proxy before it that is slow, breaks off, or refuses on demand.

Both exist for the length of a `with` and leave no thread, socket or process.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.client import HTTPConnection, HTTPException, HTTPResponse
from io import BytesIO
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import pytest
from range_server import LocalHandler, LocalServer

from mergekit_lfm.store.buckets import bucket_name
from mergekit_lfm.store.buckets.client import open_store
from mergekit_lfm.store.buckets.put import put_file
from mergekit_lfm.store.files import digest_file

Fault = Callable[[str, str, Message], str | None]  # (method, path with query, headers) -> what goes wrong

REFUSALS = {"403": "AccessDenied", "429": "TooManyRequests", "500": "InternalError", "503": "SlowDown"}
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}

# Ends with the pipe to its stdin, so that it does not survive a test run that is killed.
_MOTO = """
import logging, os, sys
from moto.server import ThreadedMotoServer
logging.disable()
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
os._exit(0)
"""


@contextmanager
def moto_server() -> Iterator[str]:
    """The address of an empty S3 in a process of its own, which takes any credentials."""
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    command = [sys.executable, "-W", "ignore", "-c", _MOTO]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, text=True) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            if not port:
                raise RuntimeError("moto did not start. Install it: pip install 'moto[s3]' flask flask-cors")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def ask(url: str, method: str, path: str) -> bytes:
    """The answer to a plain request: PUT `/bucket` makes a bucket, GET `/bucket?uploads` lists open uploads."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        connection.request(method, path)
        with connection.getresponse() as response:
            body = response.read()
        if not 200 <= response.status < 300:
            raise RuntimeError(f"{method} {path}: {response.status} {body.decode()}")
        return body
    finally:
        connection.close()


class Proxy(LocalServer):
    """Passes requests on to `upstream`, waits `latency_s` before each, and does what `faults` says.

    `faults` is a list whose first entry each request takes off (None, or an empty list: no fault), or a function
    of method, path and headers, called from several threads. The faults:

    - "403", "429", "500", "503": refuse with this status and S3's error document; upstream sees nothing;
    - "drop": close the connection before upstream sees the request;
    - "cut": send half of the body, then close the connection; without a body, close it instead of answering;
    - "stall": send half of the body, nothing for `stall_s`, then the rest; without a body, wait before answering;
    - "slow": send the body in ten pieces, 0.1 s apart.

    `requests` has (method, path with query, Range header) of each request, and `sent` counts the bytes of bodies.
    """

    def __init__(
        self, upstream: str, latency_s: float = 0.0, faults: Fault | Iterable[str | None] = (), *, stall_s: float = 5.0
    ) -> None:
        super().__init__(_Passing)
        self.upstream = urlsplit(upstream).netloc
        self.latency_s, self.stall_s = latency_s, stall_s
        self.faults = faults if callable(faults) or isinstance(faults, list) else list(faults)
        self.requests: list[tuple[str, str, str | None]] = []
        self.sent = 0

    def receive(self, method: str, path: str, headers: Message) -> str | None:
        """Record a request, and return its fault."""
        with self.lock:
            self.requests.append((method, path, headers.get("Range")))
            if not callable(self.faults):
                return self.faults.pop(0) if self.faults else None
        return self.faults(method, path, headers)


class _Passing(LocalHandler):
    server: Proxy

    def setup(self) -> None:
        super().setup()
        self.upstream = HTTPConnection(self.server.upstream, timeout=60)

    def finish(self) -> None:
        self.upstream.close()
        super().finish()

    def _pass_on(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:  # the client has left
            self.close_connection = True
            return
        fault = self.server.receive(self.command, self.path, self.headers)
        self.server.closing.wait(self.server.latency_s)
        if fault in REFUSALS:
            self.refuse(int(fault), REFUSALS[fault])
        elif fault == "drop":
            self.close_connection = True
        else:
            try:
                with self._forward(body) as response:
                    self._return(response, fault)
            except (HTTPException, OSError):  # either side has left
                self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def _forward(self, body: bytes) -> HTTPResponse:
        self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in HOP_BY_HOP:
                self.upstream.putheader(name, value)
        self.upstream.putheader("Content-Length", str(len(body)))
        self.upstream.endheaders(body)
        return self.upstream.getresponse()

    def _return(self, response: HTTPResponse, fault: str | None) -> None:
        headers = {name: value for name, value in response.getheaders() if name.lower() not in HOP_BY_HOP}
        source: BinaryIO | HTTPResponse = response
        length = response.length
        if length is None:  # it ends with upstream's connection: read it first, to be able to keep ours
            body = response.read()
            source, length = BytesIO(body), len(body)
        headers["Content-Length"] = response.getheader("Content-Length", "0") if self.command == "HEAD" else str(length)
        if length == 0 and fault == "stall":
            self.server.closing.wait(self.server.stall_s)
        if length == 0 and fault == "cut":
            self.close_connection = True
        else:
            self.answer(response.status, headers)
            self._send(source, length, fault)

    def _send(self, source: BinaryIO | HTTPResponse, length: int, fault: str | None) -> None:
        half = length // 2 if fault in ("cut", "stall") else 0
        piece = max(1, length // 10) if fault == "slow" else 1 << 18
        at = 0
        while at < length and not self.server.closing.is_set():
            block = source.read(min(piece, (half if at < half else length) - at))
            self.wfile.write(block)
            at += len(block)
            with self.server.lock:
                self.server.sent += len(block)
            if not block or (fault == "cut" and at == half):
                break
            if fault == "slow":
                self.server.closing.wait(0.1)
            if fault == "stall" and at == half:
                self.server.closing.wait(self.server.stall_s)
        self.close_connection |= at < length


BUCKET = "bucket-of-tests"
VARIABLES = {
    "AWS_ACCESS_KEY_ID": "anyone",
    "AWS_SECRET_ACCESS_KEY": "anything",
    "AWS_REGION": "us-east-1",
    "NO_PROXY": "127.0.0.1",
}


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a store with the bucket, one for each worker."""
    with moto_server() as url:
        ask(url, "PUT", f"/{BUCKET}")
        yield url


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    """The way to the store, which the environment names, and an empty cache."""
    with Proxy(s3_server) as proxy:
        for name, value in {**VARIABLES, "AWS_ENDPOINT_URL": proxy.url}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        open_store.cache_clear()
        yield proxy
        open_store.cache_clear()


def upload(folder: Path, address: str) -> str:
    """Put the files of a folder at an address, and return that."""
    name = bucket_name(address)
    assert name is not None
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            put_file(name, path.relative_to(folder).as_posix(), path, digest_file(path), lambda _: None)
    return address
