"""Wrong answers of a Hub: other bytes, other ranges, listings without an end, silence. Each is refused."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import pytest
from helpers_hub import fast_retries, prepare
from hub_server import HubServer
from hub_store import git_oid

from mergekit_lfm import merge, open_checkpoint
from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.hub import requests
from mergekit_lfm.store.hub.snapshots import HubSnapshot
from mergekit_lfm.store.snapshot import FIRST_RANGE

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def folder(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a recipe of two models on the Hub."""
    place = tmp_path / "here"
    place.mkdir()
    prepare(hub, place)
    monkeypatch.chdir(place)
    fast_retries(monkeypatch)
    return place


def cached(folder: Path) -> list[Path]:
    """The weights in the client's cache, as links and as blobs."""
    client = folder.parent / "client"
    return [
        path for path in client.rglob("*") if path.is_file() and (path.name == WEIGHTS or path.stat().st_size > 5000)
    ]


def flipped(data: bytes) -> bytes:
    """The data with another last byte."""
    return data[:-1] + bytes([data[-1] ^ 1])


def snapshot_of(model: str) -> HubSnapshot:
    found = open_checkpoint(model).snapshot
    assert isinstance(found, HubSnapshot)
    return found


# ------------------------------------------------------------------ other bytes than the Hub lists


def test_weights_with_a_wrong_byte_are_refused_and_removed(hub: HubServer, folder: Path) -> None:
    weights = hub.files("org/a")[WEIGHTS]
    snapshot = snapshot_of("org/a")
    hub.fault("GET", "/blob/", status=200, body=flipped(weights), times=None)
    listed = hub.store.resolve("org/a", "main").tree[WEIGHTS].sha256
    with pytest.raises(FormatError, match=f"{WEIGHTS} was downloaded with the sha256 .* but the Hub lists {listed}"):
        snapshot.fetch([WEIGHTS])
    assert cached(folder) == []
    hub.clear_faults()
    merge("recipe.yaml", "out")
    assert snapshot.lacking([WEIGHTS]) == []


def test_a_config_with_a_wrong_byte_is_refused_and_removed(hub: HubServer) -> None:
    config = hub.files("org/a")["config.json"]
    hub.fault("GET", "/resolve/.*config.json", status=200, headers=git_headers(hub), body=config[:-2] + b" }", times=1)
    with pytest.raises(FormatError, match=f"config.json was downloaded with the sha1 .* lists {git_oid(config)}"):
        open_checkpoint("org/a")
    assert open_checkpoint("org/a").config == json.loads(config)


def git_headers(hub: HubServer) -> dict[str, str]:
    """The headers by which the client knows a file in git."""
    commit = hub.store.resolve("org/a", "main")
    return {"X-Repo-Commit": commit.sha, "ETag": f'"{commit.tree["config.json"].oid}"'}


# ------------------------------------------------------------------ ranges


@pytest.mark.parametrize(
    ("status", "headers", "cut", "message"),
    [
        (206, {"Content-Range": "bytes 8-{last}/{size}"}, 0, "has the range 'bytes 8-"),
        (206, {"Content-Range": "bytes 0-{last}/{more}"}, 0, "has the range 'bytes 0-"),
        (206, {}, 0, "has the range None"),
        (206, {"Content-Range": "bytes 0-{last}/{size}"}, 3, "bytes, expected "),
        (206, {"Content-Range": "bytes 0-{last}/{size}"}, -3, "bytes, expected "),
    ],
)
def test_another_range_is_refused(status: int, headers: dict[str, str], cut: int, message: str, hub: HubServer) -> None:
    data = hub.files("org/a")[WEIGHTS]
    size = len(data)
    asked = min(size, FIRST_RANGE)
    facts = {"last": asked - 1, "size": size, "more": size + 1}
    body = data[: asked - cut] + b"x" * -cut
    headers = {key: value.format(**facts) for key, value in headers.items()}
    hub.fault("GET", "/blob/", status=status, headers=headers, body=body, times=None)
    with pytest.raises(ConnectionError, match=re.escape(message)):
        open_checkpoint("org/a")


def test_a_header_that_is_not_the_one_of_the_file_is_refused(hub: HubServer) -> None:
    """Two tensors of one shape change places, so that their bytes would be taken for one another's."""
    data = hub.files("org/a")[WEIGHTS]
    one, other, neither = (f"layers.{i}.self_attn.q_proj".encode() for i in (0, 1, 9))
    swapped = data.replace(one, neither).replace(other, one).replace(neither, other)
    asked = min(len(data), FIRST_RANGE)
    assert len(swapped) == len(data) and swapped[:asked] != data[:asked]
    range_of = {"Content-Range": f"bytes 0-{asked - 1}/{len(data)}"}
    hub.fault("GET", "/blob/", status=206, headers=range_of, body=swapped[:asked], times=1)
    model = open_checkpoint("org/a")
    with pytest.raises(FormatError, match="another header was sent when the merge was planned"):
        model.read(next(iter(model)))
    assert len(open_checkpoint("org/a").read(next(iter(model)))) > 0


def test_a_server_without_ranges_makes_planning_download(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_lfm.store.snapshot.FIRST_RANGE", 100)
    data = hub.files("org/a")[WEIGHTS]
    hub.fault("GET", "/blob/", status=200, body=data, times=None)
    model = open_checkpoint("org/a")
    assert not model.absent and model.nbytes < len(data)


def test_no_more_of_an_answer_is_read_than_was_asked(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "PAGE_BYTES", 1000)
    hub.fault("GET", "/tree/", status=200, body=b"[" + b" " * 2000 + b"]", times=None)
    with pytest.raises(ConnectionError, match="is not a list of files"):
        open_checkpoint("org/a")


# ------------------------------------------------------------------ listings


def test_a_listing_comes_in_pages(hub: HubServer) -> None:
    hub.page = 1
    assert set(snapshot_of("org/a").sizes) == hub.files("org/a").keys()


@pytest.mark.parametrize(
    ("body", "cursor", "message"),
    [
        ("[]", "2", "has no end after 0 files"),
        ('[{"type": "directory"}]', "2", "has no end after 2 files"),
        ("", "", "is not a list of files"),
        ('{"error": 1}', "", "is not a list of files"),
        ("[" * 100_000, "", "is not a list of files"),
        ('[{"type": "file", "path": "../x", "size": 1, "oid": "0"}]', "", "is not a list of files"),
        ('[{"type": "file", "path": "x", "size": true, "oid": "0"}]', "", "is not a list of files"),
        ('[{"type": "file", "path": "x", "size": -1, "oid": "0"}]', "", "is not a list of files"),
    ],
)
def test_a_listing_that_is_none_is_refused(body: str, cursor: str, message: str, hub: HubServer) -> None:
    link = {"Link": f'<http://other.example/x?cursor={cursor}>; rel="next"'} if cursor else {}
    hub.fault("GET", "/tree/", status=200, headers=link, body=body.encode(), times=None)
    with pytest.raises(ConnectionError, match=message):
        open_checkpoint("org/a")


def test_a_listing_of_too_many_files_is_refused(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MOST_FILES", 2)
    hub.page = 1
    with pytest.raises(ConnectionError, match="has no end after 3 files, of at most 2"):
        open_checkpoint("org/a")


# ------------------------------------------------------------------ silence


def test_a_server_that_does_not_answer_is_given_up(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    silence = threading.Event()
    monkeypatch.setattr(requests, "TIMEOUT_S", 0.05)
    hub.fault("GET", "/tree/", before=lambda: silence.wait(30), times=None)
    try:
        with pytest.raises(ConnectionError, match=r"the connection to the Hub at .* failed for org/a"):
            open_checkpoint("org/a")
    finally:
        silence.set()


def test_a_server_that_sends_too_slowly_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "LONGEST_S", -1)
    with pytest.raises(ConnectionError, match="sends too slowly"):
        open_checkpoint("org/a")
