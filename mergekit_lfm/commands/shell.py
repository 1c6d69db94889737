"""The side of a command that faces the shell: sizes as arguments, errors as one message, exit codes."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.machine.sizes import parse_size
from mergekit_lfm.machine.text import printable, printable_message
from mergekit_lfm.store.hub import HubName, hub_name, nearest_name

ANSWER_IS_NO = 1
BAD_INPUT = 2  # or a bad environment; also what click exits with on bad usage
_SIGNAL = f"{__name__}.signal"  # where a click context has the signal that interrupted the command
NO_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"  # a variable of huggingface_hub


def show(text: object, *, err: bool = False) -> None:
    """Print text for people. JSON and the path of a result are for scripts, and printed as they are."""
    click.echo(printable(text), err=err)


class Command(click.Command):
    """A command whose expected errors are one message and an exit code, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; models on the Hub among its arguments are downloaded to the cache before."""
        try:
            with _signals_as_ctrl_c(ctx), warnings.catch_warnings():
                for param in self.params:
                    if isinstance(param.type, ModelFolder) and param.name is not None:
                        ctx.params[param.name] = _download(ctx.params[param.name], ctx)
                from mergekit_lfm.api.outcome import Finding

                warnings.simplefilter("ignore", Finding)  # the command prints an outcome's warnings
                return super().invoke(ctx)
        except (FormatError, PlanError) as error:
            message = str(error)
        except ImportError as error:  # the extra that loads models is not installed
            if error.name != "transformers":
                raise
            message = str(error)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has gone; click ends quietly
                raise
            message = _os_message(error)
        except KeyboardInterrupt:
            show("interrupted", err=True)
            ctx.exit(interrupted_code(ctx))
        click.echo(f"error: {printable_message(message)}", err=True)
        ctx.exit(BAD_INPUT)


@contextmanager
def _signals_as_ctrl_c(ctx: click.Context) -> Iterator[None]:
    """Within it SIGTERM and SIGHUP do what Ctrl-C does, unless somebody handles or ignores them, as nohup does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        ctx.meta[_SIGNAL] = number
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):  # a shell ignores Ctrl-C for jobs in the background
            raise KeyboardInterrupt
        handler(number, frame)

    ends = threading.current_thread() is threading.main_thread()
    taken = [n for n in (signal.SIGTERM, signal.SIGHUP) if ends and signal.getsignal(n) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def interrupted_code(ctx: click.Context) -> int:
    """The exit code of an interrupted command, as shells have it: 128 and the signal's number."""
    return 128 + int(ctx.meta.get(_SIGNAL, signal.SIGINT))


def _os_message(error: OSError) -> str:
    text = error.strerror or str(error)
    if error.filename is not None:
        text = f"{os.fsdecode(error.filename)}: {text}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        text += "; free some space and run the same command again, it goes on where it stopped"
    return text


class ModelFolder(click.ParamType):  # type: ignore[type-arg]
    """A model's folder; or a model on the Hub, org/name or org/name@revision, which the command gets as a folder."""

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | HubName:
        """The folder; if it does not exist, the model's name on the Hub."""
        folder = Path(value)
        if folder.exists() or (name := hub_name(str(value))) is None:
            if "://" in str(value):  # a path would lose one of the slashes
                self.fail(f"found {str(value)!r}, but there is no such folder{nearest_name(str(value))}", param, ctx)
            return folder
        return name


def _download(value: Any, ctx: click.Context) -> Any:
    """The value, or values, of a parameter, with folders in place of models on the Hub."""
    if isinstance(value, tuple):
        return tuple(_download(each, ctx) for each in value)
    if not isinstance(value, HubName):
        return value
    from mergekit_lfm.store.sidecars import download

    with transfers(hidden=bool(ctx.params.get("quiet") or ctx.params.get("as_json"))):
        return download(value)


@contextmanager
def transfers(*, hidden: bool) -> Iterator[None]:
    """Within it, transfers from and to the Hub show their progress on a terminal, unless hidden."""
    if not hidden and sys.stderr.isatty():
        yield
    elif "huggingface_hub" in sys.modules:
        from mergekit_lfm.store.hub.client import hide_progress_bars

        with hide_progress_bars():
            yield
    else:  # few commands need the client, which reads this when it is imported
        before = os.environ.get(NO_BARS)
        os.environ[NO_BARS] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[NO_BARS]
            else:
                os.environ[NO_BARS] = before


class Size(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5 only
    """50KB, 5GB, 3GiB, or a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes; a usage error for any other text."""
        try:
            return parse_size(value)
        except PlanError as error:
            self.fail(str(error), param, ctx)
