"""Requests to object stores, by obstore, and its errors as messages of ours.

A store is set up by the environment, as its own programs are: docs/buckets.md names the variables. A refusal is a
PlanError; a failure on the way is a ConnectionError, after the library's own tries, which go on where an answer broke
off.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from importlib import import_module
from typing import Any

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.machine.text import printable_line, strip_queries
from mergekit_lfm.store.buckets.names import BucketName

TRIES, PAUSE_S = 2, 1.0  # of requests that the library does not make again, and the pause before the second
SILENCE_S = 15  # without a byte of an answer
READING_S, SENDING_S = 30, 180  # to try a request again
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
VARIABLES = re.compile(r"(AWS|GOOGLE|AZURE)_[A-Z_0-9]+")
CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to a key's file, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or AZURE_SKIP_SIGNATURE=true for a public one",
}


def import_obstore() -> Any:
    """The library. Raises PlanError if it is not installed."""
    try:
        return import_module("obstore")
    except ImportError:
        raise PlanError("buckets need obstore: {cure}", cure='pip install "mergekit_lfm[remote]"') from None


@lru_cache(maxsize=64)
def open_store(name: BucketName, *, sending: bool = False) -> Any:
    """The client of a folder in a bucket; its requests name files in that folder. Sends nothing itself.

    sending: for requests that send files, whose answers begin late. Raises PlanError for settings that cannot be.
    """
    import_obstore()
    stores, endpoint = import_module("obstore.store"), _endpoint()
    options: dict[str, Any] = {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(minutes=5)}
    if not sending:
        options["read_timeout"] = timedelta(seconds=SILENCE_S)
    retry = {"max_retries": 8, "retry_timeout": timedelta(seconds=SENDING_S if sending else READING_S)}
    how: dict[str, Any] = {"client_options": options, "retry_config": retry}
    try:
        if name.scheme == "gs":
            return stores.GCSStore(name.bucket, prefix=name.path, **how)
        if name.scheme == "az":
            container, _, path = name.path.partition("/")
            return stores.AzureStore(container, account_name=name.bucket, prefix=path or None, **how)
        if endpoint:
            how["endpoint"], options["allow_http"] = endpoint, endpoint.lower().startswith("http://")
        return stores.S3Store(name.bucket, prefix=name.path, **how)
    except Exception as error:
        sentence = "{place}: the settings for its store cannot be used: {found}; {cure}"
        raise PlanError(sentence, place=name, found=_reason(error), cure=CREDENTIALS[name.scheme]) from None


def _endpoint() -> str:
    """The address of a store of one's own, "" without one. Raises PlanError if it, or another setting, is malformed."""
    for key, value in os.environ.items():
        if VARIABLES.fullmatch(key) and not (value.isprintable() and value.isascii() and value.strip() == value):
            raise PlanError(
                "{place} {found}; {cure}", place=key, found="has a space or a line break", cure="set it anew"
            )
    key = next((key for key in ENDPOINTS if os.environ.get(key)), "")
    endpoint = os.environ.get(key, "")
    if key and not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s?#@]*)?", endpoint, re.IGNORECASE):
        expected = "http://HOST:PORT or https://HOST"
        raise PlanError("{place} is not an address, expected {expected}", place=key, expected=expected)
    return endpoint


def again(name: BucketName, file: str, request: Callable[[], Any]) -> Any:
    """The result of a request, made again after failures on the way."""
    for number in range(1, TRIES + 1):
        try:
            with translated(name, file):
                return request()
        except ConnectionError:
            if number == TRIES:
                raise
        time.sleep(PAUSE_S * number)
    raise AssertionError("the last try returns or raises")


@contextmanager
def translated(name: BucketName, file: str = "") -> Iterator[None]:
    """Turn the library's errors about a place, or a file in it, into messages for the user."""
    try:
        yield
    except FileNotFoundError:
        sentence = "{place}: found nothing there; {cure}"
        raise PlanError(sentence, place=_place(name, file), cure="give the address of a folder or a file") from None
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # of the library's own language
            raise PlanError("{place}: {found}", place=_place(name, file), found=_reason(error)) from None
        if not type(error).__module__.startswith("obstore"):
            raise
        raise _explain(name, file, error) from None


def _place(name: BucketName, file: str) -> str:
    return f"{name}/{file}" if file else str(name)


def _explain(name: BucketName, file: str, error: BaseException) -> Exception:
    """The error to raise for one of the library."""
    kind, reason, place = type(error).__name__, _reason(error), _place(name, file)
    status = _status_in(reason)
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or status in (401, 403):
        sentence = "{place}: the store refuses the request; {cure}"
        return PlanError(sentence, place=place, cure=CREDENTIALS[name.scheme])
    if kind == "PreconditionError":
        return FormatError("{place} was changed since it was listed; {cure}", place=place, cure="run the command again")
    if status == 404:
        sentence = "{place}: there is no bucket {found}; {cure}"
        return PlanError(sentence, place=place, found=name.bucket, cure="see that the name and the region are right")
    passing = status is None or status >= 500 or status in (408, 429)
    if kind in ("GenericError", "JoinError") and passing and "builder error" not in reason:
        return ConnectionError(
            f"the connection to the store of {place} failed ({reason}); run the same command again: finished work is "
            "kept"
        )
    return PlanError("{place}: {found}", place=place, found=reason)


def _status_in(reason: str) -> int | None:
    """The status in the library's message about an answer that it does not expect, None without one."""
    _, found, rest = reason.partition("status code: ")
    return int(rest[:3]) if found and rest[:3].isdigit() else None


def _reason(error: BaseException) -> str:
    """The library's message in a line, without what it says for its own developers."""
    text = str(error).split("\n\nDebug source:")[0]
    text = re.sub(r"://[^\s/@]*@", "://", " ".join(text.split()))  # a name and a password
    return printable_line(strip_queries(text))[:400]
