"""The Hub as it is asked here: one client, and its errors as messages of ours, which name no token.

What the Hub refuses is a PlanError; what failed on the way there is a ConnectionError, after the client's own retries.
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
except ImportError:  # it is not there for every kind of machine
    hf_xet = None

from mergekit_lfm.errors import PlanError
from mergekit_lfm.version import __version__

HTTPError: type[Exception] = HfHubHTTPError.__mro__[1]  # of the client's HTTP library: httpx, or its successor
XET_ERRORS: tuple[type[Exception], ...] = tuple(
    getattr(hf_xet, name) for name in ("XetAuthenticationError", "XetObjectNotFoundError") if hasattr(hf_xet, name)
)
# What the client's native part says in a ConnectionError: it asks for the tokens of uploads by itself.
NATIVE = re.compile("Network error|Rate limited|Server error")
_RETRY = "run the same command again: what is done is kept"


def api() -> HfApi:
    """The client; its token is HF_TOKEN, or what `hf auth login` has stored. PlanError where that can be no token."""
    token = get_token()
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise PlanError("the token of the Hub has characters that no token has: set HF_TOKEN anew, without quotes")
    return HfApi(endpoint=endpoint(), library_name="mergekit_lfm", library_version=__version__)


def endpoint() -> str:
    """The address of the Hub."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def offline() -> bool:
    """Whether the Hub must not be asked (HF_HUB_OFFLINE)."""
    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def asking(about: str) -> Iterator[None]:
    """Gives what goes wrong in asking the Hub about something the message that a user needs."""
    with _addresses_hidden():
        try:
            yield
        except XET_ERRORS as error:
            raise _unreached(about, error) from None
        except ConnectionError as error:
            if isinstance(error, OfflineModeIsEnabled):
                raise _explained(about, error) from None
            if not NATIVE.match(str(error)):  # it is one of ours
                raise
            status = re.search(r"\((\d{3}) ", str(error))
            raise (_refused(about, int(status[1]), error) if status else _unreached(about, error)) from None
        except RuntimeError as error:
            if type(error) is not RuntimeError:
                raise
            cause = error.__cause__  # of an upload that failed; without one, what the client's native part says
            known = isinstance(cause, HTTPError)
            raise _explained(about, cause if known and isinstance(cause, Exception) else error) from None
        except LocalEntryNotFoundError as error:  # what the client says where it found nothing in the cache either
            cause = error.__cause__ or error.__context__
            raise _explained(about, cause if isinstance(cause, Exception) else error) from None
        except (HTTPError, RevisionResolutionError, EntryNotFoundError) as error:
            raise _explained(about, error) from None


def _explained(about: str, error: Exception) -> Exception:
    place = endpoint()
    if offline() or isinstance(error, OfflineModeIsEnabled):
        return PlanError(
            f"{about} is not whole in the cache of the Hub ({constants.HF_HUB_CACHE}), and the Hub is not asked, as "
            "HF_HUB_OFFLINE is set: unset it, or download the model with `hf download` where there is a network"
        )
    if "Invalid credentials" in _said(error):  # else it may look like a repository that is not found
        return _refused(about, 401, error)
    if isinstance(error, GatedRepoError):
        return PlanError(
            f"{about} is gated: accept its conditions on {place}/{about.partition('@')[0]} with the account whose "
            f"token is used here{_without_token()}{_in_brackets(error)}"
        )
    if isinstance(error, RevisionNotFoundError):
        return PlanError(f"{about}: the repository is there, but no such branch, tag or commit; look at {place}")
    if isinstance(error, RepositoryNotFoundError):
        return PlanError(
            f"there is no model {about} at {place}, or it is private and not open to this "
            f"account{_without_token() or ': check the name'}"
        )
    if isinstance(error, EntryNotFoundError):
        return PlanError(f"{about}: a file is not there any more; give a revision that has it")
    status = getattr(getattr(error, "response", None), "status_code", None)
    return _refused(about, status, error) if status is not None else _unreached(about, error)


def _without_token() -> str:
    return "" if get_token() else "; no token was found: set HF_TOKEN, or run `hf auth login`"


def _refused(about: str, status: int, error: Any) -> Exception:
    """What an answer with an error code means."""
    reason = _in_brackets(error)
    if status == 401:
        return PlanError(
            f"the Hub at {endpoint()} refuses the token{reason}: set HF_TOKEN to a valid one, or run `hf auth login`"
        )
    if status == 403:
        return PlanError(f"{about}: the account of the token may not do this{reason}; use a token that may")
    if status == 412:
        return PlanError(
            f"{about} was changed by somebody else in the meantime, so nothing was pushed: look at what changed, then "
            "run the same command again; files that are uploaded already are not sent again"
        )
    if status == 429:
        return ConnectionError(
            f"the Hub at {endpoint()} limits how often it is asked (429){_wait(error)}, then {_RETRY}"
        )
    if status >= 500 or status == 408:
        return ConnectionError(f"the Hub at {endpoint()} fails to answer about {about} ({status}){reason}; {_RETRY}")
    return PlanError(f"{about}: the Hub at {endpoint()} refuses the request ({status}){reason}")


def _said(error: Exception) -> str:
    """What the Hub said itself, in a line; "" for nothing."""
    response = getattr(error, "response", None)
    said = "" if response is None else response.headers.get("X-Error-Message")
    return shortened(" ".join(str(said or getattr(error, "server_message", None) or "").split()).rstrip("."))


def _in_brackets(error: Exception) -> str:
    said = _said(error)
    return f" ({said})" if said else ""


def shortened(text: str) -> str:
    """The text without what stands after the ? of an address: there, it may be a key to it."""
    return re.sub(r"(https?://[^\s?]*)\?[^\s)]*", r"\1", text)


def _wait(error: Any) -> str:
    headers = getattr(getattr(error, "response", None), "headers", {})
    limit = parse_ratelimit_headers(headers)
    seconds = limit.reset_in_seconds if limit else headers.get("Retry-After")
    return f": wait {seconds} s" if seconds is not None else ": wait a minute"


def _unreached(about: str, error: Exception) -> Exception:
    reason = shortened(str(error).strip().split("\n")[0]) or type(error).__name__
    return ConnectionError(
        f"the connection to the Hub at {endpoint()} failed for {about} ({reason}); {_RETRY}. With HF_HUB_OFFLINE=1, "
        "models that are in the cache are read without it"
    )


@contextmanager
def no_bars() -> Iterator[None]:
    """While it lasts, the client shows no progress."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


class _Shorten(logging.Filter):
    """Takes from the client's warnings what may be a key."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = shortened(record.getMessage()), ()
        return True


@contextmanager
def _addresses_hidden() -> Iterator[None]:
    """While it lasts, the client's warnings name no signed address."""
    handlers, shorten = logging.getLogger("huggingface_hub").handlers, _Shorten()
    for handler in handlers:
        handler.addFilter(shorten)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(shorten)
