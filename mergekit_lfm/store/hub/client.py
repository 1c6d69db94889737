"""One client for the Hub, and its errors as messages of ours, which never contain a token.

A refusal of the Hub is a PlanError; a failure on the way there is a ConnectionError, after the client's own retries.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but not in its __all__
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    parse_ratelimit_headers,
)

try:
    import hf_xet
except ImportError:  # not available for every platform
    hf_xet = None

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.text import printable_line, strip_queries
from mergekit_lfm.version import __version__

HTTPError: type[Exception] = HfHubHTTPError.__mro__[1]  # of the client's HTTP library: httpx, or its successor
XET_ERRORS: tuple[type[Exception], ...] = tuple(
    getattr(hf_xet, name) for name in ("XetAuthenticationError", "XetObjectNotFoundError") if hasattr(hf_xet, name)
)
# How ConnectionErrors of the client's native part begin, which requests the tokens of uploads itself.
NATIVE = re.compile("Network error|Rate limited|Server error")
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
# Names under which people keep their token, and which the client does not read.
UNREAD_TOKENS = [f"HUGGINGFACE_{end}" for end in ("TOKEN", "HUB_TOKEN", "API_KEY")]
UNREAD_TOKENS += ["HUGGINGFACEHUB_API_TOKEN", "HUGGING_FACE_TOKEN"]
UNREAD_TOKENS += [f"HF_{end}" for end in ("API_TOKEN", "API_KEY", "HUB_TOKEN", "ACCESS_TOKEN", "KEY")]
_RETRY = "run the same command again: finished work is kept"


def api() -> HfApi:
    """The client, with the token of HF_TOKEN or `hf auth login`. Raises PlanError if that is not a valid token."""
    token = get_token()
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise PlanError("the token of the Hub has characters that no token has: set HF_TOKEN again, without quotes")
    return HfApi(endpoint=endpoint(), library_name="mergekit_lfm", library_version=__version__)


def endpoint() -> str:
    """The address of the Hub."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def offline() -> bool:
    """True if HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids requests to the Hub."""
    return bool(constants.HF_HUB_OFFLINE)


def offline_variable() -> str:
    """The name of the variable that forbids requests; the client reads the second only without the first."""
    first, second = OFFLINE_VARIABLES
    return second if os.environ.get(second) and not os.environ.get(first) else first


def how_to_sign_in() -> str:
    """The way to give a token, and the variables that look like one but are not read."""
    unread = [name for name in UNREAD_TOKENS if os.environ.get(name)]
    verb = "is" if len(unread) == 1 else "are"
    note = f" ({', '.join(unread)} {verb} set, but no program of the Hub reads it)" if unread else ""
    return f"set HF_TOKEN{note}, or run `hf auth login`"


@contextmanager
def translate_errors(about: str) -> Iterator[None]:
    """Turn errors of requests to the Hub about a model into messages for the user."""
    with _hide_addresses():
        try:
            yield
        except XET_ERRORS as error:
            raise _connection_error(about, error) from None
        except ConnectionError as error:
            if isinstance(error, OfflineModeIsEnabled):
                raise _explain(about, error) from None
            if not NATIVE.match(str(error)):  # one of our own
                raise
            status = re.search(r"\((\d{3}) ", str(error))
            raise (_refusal(about, int(status[1]), error) if status else _connection_error(about, error)) from None
        except RuntimeError as error:
            if type(error) is not RuntimeError:
                raise
            cause = error.__cause__  # of a failed upload; the client's native part gives none
            if isinstance(cause, OSError) and cause.errno is not None:  # of the disk, not of the connection
                raise cause from None
            known = isinstance(cause, HTTPError)
            raise _explain(about, cause if known and isinstance(cause, Exception) else error) from None
        except LocalEntryNotFoundError as error:  # the client found nothing in the cache either
            cause = error.__cause__ or error.__context__
            raise _explain(about, cause if isinstance(cause, Exception) else error) from None
        except (HTTPError, RevisionResolutionError, EntryNotFoundError) as error:
            raise _explain(about, error) from None


def _explain(about: str, error: Exception) -> Exception:
    address = endpoint()
    if offline() or isinstance(error, OfflineModeIsEnabled):
        return PlanError(
            f"{about} is incomplete in the cache of the Hub ({constants.HF_HUB_CACHE}), and {offline_variable()} "
            "forbids downloads: unset it, or download the model with `hf download` while online"
        )
    if "Invalid credentials" in _server_message(error):  # else it may look like a missing repository
        return _refusal(about, 401, error)
    if isinstance(error, GatedRepoError):
        return PlanError(
            f"{about} is gated: accept its conditions on {address}/{about.partition('@')[0]} with the account of your "
            f"token{_without_token()}{_in_brackets(error)}"
        )
    if isinstance(error, RevisionNotFoundError):
        return PlanError(f"{about}: the repository exists, but has no such branch, tag or commit; look at {address}")
    if isinstance(error, RepositoryNotFoundError):
        return PlanError(
            f"found no model {about} at {address}, or it is private and this account may not read "
            f"it{_without_token() or ': check the name'}"
        )
    if isinstance(error, EntryNotFoundError):
        return PlanError(f"{about}: a file no longer exists; give a revision that has it")
    status = getattr(getattr(error, "response", None), "status_code", None)
    return _refusal(about, status, error) if status is not None else _connection_error(about, error)


def _without_token() -> str:
    return "" if get_token() else f"; no token was found: {how_to_sign_in()}"


def _refusal(about: str, status: int, error: Any) -> Exception:
    """The error for an answer with this status code."""
    reason = _in_brackets(error)
    if status == 401:
        return PlanError(
            f"the Hub at {endpoint()} refuses the token{reason}: set HF_TOKEN to a valid one, or run `hf auth login`"
        )
    if status == 403:
        return PlanError(f"{about}: the account of the token may not do this{reason}; use a token that may")
    if status == 412:
        return PlanError(
            f"somebody else changed {about} in the meantime, so nothing was pushed: look at the changes, then run the "
            "same command again; uploaded files are not sent again"
        )
    if status == 429:
        return ConnectionError(
            f"the Hub at {endpoint()} limits the rate of requests (429){_wait(error)}, then {_RETRY}"
        )
    if status >= 500 or status == 408:
        return ConnectionError(f"the Hub at {endpoint()} fails to answer about {about} ({status}){reason}; {_RETRY}")
    return PlanError(f"{about}: the Hub at {endpoint()} refuses the request ({status}){reason}")


def _server_message(error: Exception) -> str:
    """The Hub's own message, in a line; "" without one."""
    response = getattr(error, "response", None)
    message = "" if response is None else response.headers.get("X-Error-Message")
    return strip_queries(" ".join(str(message or getattr(error, "server_message", None) or "").split()).rstrip("."))


def _in_brackets(error: Exception) -> str:
    message = _server_message(error)
    return f" ({message})" if message else ""


def _wait(error: Any) -> str:
    headers = getattr(getattr(error, "response", None), "headers", {})
    limit = parse_ratelimit_headers(headers)
    seconds = limit.reset_in_seconds if limit else headers.get("Retry-After")
    return f": wait {seconds} s" if seconds is not None else ": wait a minute"


def _connection_error(about: str, error: Exception) -> Exception:
    reason = strip_queries(str(error).strip().split("\n")[0]) or type(error).__name__
    return ConnectionError(
        f"the connection to the Hub at {endpoint()} failed for {about} ({reason}); {_RETRY}. With HF_HUB_OFFLINE=1, "
        "models in the cache are read without it"
    )


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hide the client's progress bars."""
    were_shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if were_shown:
            enable_progress_bars()


class _Shorten(logging.Filter):
    """Log filter that removes the query strings of signed URLs, and all that is not printable."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable_line(strip_queries(record.getMessage())), ()
        return True


@contextmanager
def _hide_addresses() -> Iterator[None]:
    """Keep signed URLs out of the client's warnings."""
    handlers, shorten = logging.getLogger("huggingface_hub").handlers, _Shorten()
    for handler in handlers:
        handler.addFilter(shorten)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(shorten)
