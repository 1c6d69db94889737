"""Requests of our own to the Hub: listings of repositories, and the first bytes of files.

The client leaves answers unbounded in time and size; here each has a limit, and is compared with the request.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but not in its __all__
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)

from mergekit_lfm.store.folder import leads_away
from mergekit_lfm.store.hub.client import HTTPError, endpoint

TIMEOUT_S = 30  # without a byte
LONGEST_S = 600  # for a whole answer
TRIES = 5
PAGE_BYTES = 20_000_000  # of a listing; a page of the Hub has 1000 files and some 300 KB
MOST_FILES = 100_000  # in a repository, as the Hub advises
EXPIRED = (400, 401, 403, 404, 410)  # answers of storage to an address that was valid
Answer = tuple[int, Mapping[str, str], bytes]

_signed = dict[str, str]()  # by the address of a file at the Hub: that at its storage


def list_files(repo: str, commit: str) -> dict[str, RepoFile]:
    """The files of a model at a commit, with their sizes and digests. Raises ConnectionError if the list is unusable.

    Call it within `translate_errors`.
    """
    return {entry.path: entry for entry in _entries(repo, commit)}


def _entries(repo: str, commit: str) -> Iterator[RepoFile]:
    url, cursor, count = f"{endpoint()}/api/models/{repo}/tree/{commit}?recursive=True", "", 0
    while True:
        more = f"&cursor={quote(cursor, safe='')}" if cursor else ""
        _, headers, data = _get(url + more, PAGE_BYTES)
        try:
            entries = [_as_file(entry) for entry in json.loads(data)]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise _unusable(repo, "is not a list of files with their sizes and digests") from None
        yield from (entry for entry in entries if entry is not None)
        count += len(entries)
        following = next(iter(parse_qs(urlsplit(_next_page(headers)).query).get("cursor", [])), "")
        if not following:
            return
        if following == cursor or not entries or count > MOST_FILES:
            raise _unusable(repo, f"has no end after {count:,} files, of at most {MOST_FILES:,}")
        cursor = following


def _next_page(headers: Mapping[str, str]) -> str:
    """The address in a `Link` header of the next page, "" without one. Only its cursor is used, on our own Hub."""
    address, _, relation = headers.get("link", "").partition(";")
    return address.strip("<> ") if 'rel="next"' in relation else ""


def _as_file(entry: Any) -> RepoFile | None:
    """A file in a listing; None for a folder. Raises ValueError, TypeError or KeyError for anything else."""
    if entry["type"] != "file":
        return None
    file = RepoFile(**entry)  # type: ignore[no-untyped-call]
    if leads_away(file.path) or type(file.size) is not int or file.size < 0 or not isinstance(file.blob_id, str):
        raise ValueError
    return file


def request_range(about: str, url: str, start: int, stop: int, size: int) -> bytes | None:
    """The bytes `start` to `stop` of a file of `size` bytes; None if its server does not answer requests for a range.

    Raises ConnectionError if the answer is another range.
    """
    status, headers, data = _get_at_storage(url, stop - start, {"Range": f"bytes={start}-{stop - 1}"})
    if status != 206 and size > stop - start:
        return None
    asked, got = f"bytes {start}-{stop - 1}/{size}", headers.get("content-range")
    if status == 206 and got != asked:
        raise _unusable(about, f"has the range {got!r}, expected {asked!r}")
    if len(data) != stop - start:
        raise _unusable(about, f"has {len(data):,} bytes, expected {stop - start:,}")
    return data


def _get_at_storage(url: str, most: int, more: Mapping[str, str]) -> Answer:
    """The answer of `_get` from where the Hub has sent an earlier request for the file, as long as that is valid.

    The Hub counts what it is asked, its storage does not. There the address has a signature in place of the token.
    """
    if address := _signed.get(url):
        try:
            return _get(address, most, more, token=False)
        except HfHubHTTPError as error:
            if error.response.status_code not in EXPIRED:
                raise
            _signed.pop(url, None)
    return _get(url, most, more, led_to=lambda address: _signed.__setitem__(url, address))


def _get(
    url: str,
    most: int,
    more: Mapping[str, str] | None = None,
    *,
    token: bool = True,
    led_to: Callable[[str], object] = lambda _: None,
) -> Answer:
    """The status, headers and body of an answer; the body up to its first `most` + 1 bytes.

    A connection that is cut in the body is tried again, like one that is refused. token: False to send none. led_to is
    called with the address that answered, if it is another.
    """
    ours = build_hf_headers(library_name="mergekit_lfm", token=None if token else False)
    headers = {**ours, "Accept-Encoding": "identity", **(more or {})}
    for attempt in range(1, TRIES + 1):
        with http_stream_backoff("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S) as response:
            hf_raise_for_status(response)
            if str(response.url) != url:
                led_to(str(response.url))
            try:
                return response.status_code, response.headers, _read(response, most)
            except HTTPError:  # must not reach the client's own loop, which cannot read a second answer
                if attempt == TRIES:
                    raise
        time.sleep(min(8, 2**attempt / 2))
    raise AssertionError("the last attempt returns or raises")


def _read(response: Any, most: int) -> bytes:
    deadline, data = time.monotonic() + LONGEST_S, bytearray()
    for part in response.iter_raw():
        data += part
        if len(data) > most:
            break
        if time.monotonic() > deadline:
            raise ConnectionError(f"the Hub at {endpoint()} sends too slowly; run the same command again")
    return bytes(data[: most + 1])


def _unusable(about: str, problem: str) -> ConnectionError:
    return ConnectionError(
        f"the answer of the Hub at {endpoint()} about {about} {problem}; run the same command again, and if it stays "
        "so, set HF_ENDPOINT to another server"
    )
