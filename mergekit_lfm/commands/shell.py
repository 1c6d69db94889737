"""The side of a command that faces the shell: models and sizes as arguments, signals, errors as one message."""

from __future__ import annotations

import errno
import gc
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

from mergekit_lfm.commands.console import BAD_INPUT, BROKEN_PIPE, Console, name_of
from mergekit_lfm.commands.show.terminal import drop
from mergekit_lfm.errors import PlanError, Refusal
from mergekit_lfm.machine.resources import explain_thread_limit
from mergekit_lfm.machine.sizes import parse_size
from mergekit_lfm.store.buckets.names import is_address
from mergekit_lfm.store.elsewhere import Elsewhere, name_elsewhere, nearest

# The cures of errors of the disk and the system, by their numbers.
CURES = {
    (errno.ENOSPC, errno.EDQUOT): "free some space and run the same command again, it goes on where it stopped",
    (errno.EIO, errno.ESTALE): "the disk, or the connection to it, fails: when it is back, run the same command again",
    (errno.EROFS, errno.EACCES): "make it accessible, or choose another place, and run the command again",
    (errno.EMFILE, errno.ENFILE): "allow more with `ulimit -n`, or write fewer, larger shards: --max-shard-size",
}
_SIGNAL = f"{__name__}.signal"  # where a click context has the signal that interrupted the command
NEW_OBJECTS = 100_000  # that are made before Python looks for cycles among them
NO_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"  # a variable of huggingface_hub


class _Quiet(click.Command):
    """A command or group that ends as others do if nobody reads its help, and not with the code for "no"."""

    def make_context(self, *arguments: Any, **extra: Any) -> click.Context:
        """The context; help and version are printed here."""
        try:
            return super().make_context(*arguments, **extra)
        except BrokenPipeError:
            drop(sys.stdout)
            raise click.exceptions.Exit(BROKEN_PIPE) from None


class Group(_Quiet, click.Group):
    """A group of commands."""


class Command(_Quiet):
    """A command whose expected errors are one message and an exit code, without a traceback.

    Its function gets a `Console` with `click.pass_obj`; the options about output are the console's.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the options; with --json among them, wrong ones are JSON, too."""
        as_json = "--json" in args
        try:
            return self.read_args(ctx, args)
        except click.UsageError as error:
            with Console(name_of(ctx), as_json=as_json, whole=True):
                raise error

    def read_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the options."""
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; models on the Hub among its arguments are downloaded to the cache before."""
        console = ctx.obj = Console.of(ctx)
        with console:
            try:
                with _signals_as_ctrl_c(ctx), _rare_collections(), warnings.catch_warnings(), explain_thread_limit():
                    console.begin(_paths(ctx))
                    for param in self.params:
                        if isinstance(param.type, ModelFolder) and param.name is not None:
                            ctx.params[param.name] = _download(ctx.params[param.name], console)
                    from mergekit_lfm.api.outcome import Finding

                    warnings.simplefilter("ignore", Finding)  # the command prints an outcome's warnings
                    return super().invoke(ctx)
            except Refusal as error:
                console.fail(error, str(error), BAD_INPUT, error.parts)
            except ImportError as error:  # the extra that loads models is not installed
                if error.name != "transformers":
                    raise
                console.fail(error, str(error), BAD_INPUT, {})
            except OSError as error:
                parts = _os_parts(error)
                console.fail(error, _os_message(**parts), BAD_INPUT, parts)
            except KeyboardInterrupt as error:
                console.fail(error, str(error) or "interrupted", _interrupted_code(ctx), {})


def _paths(ctx: click.Context) -> Iterator[Path]:
    """The paths among the parameters, and all arguments, which may be paths."""
    for param in ctx.command.params:
        value = ctx.params.get(param.name or "")
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, Path):
                yield each
            elif isinstance(each, str) and isinstance(param, click.Argument):
                yield Path(each)


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


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Within it Python looks for unused cycles of objects rarely, and among those of the command no more behind it.

    By default it does after each 700 new objects: a fifth of the time of a merge of 32,000 tensors, whose plan has a
    million of them, all in use. Behind the command and at the end of the process it would look at all of them three
    times, and at torch's.
    """
    before = gc.get_threshold()
    gc.set_threshold(NEW_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.freeze()
        gc.set_threshold(*before)


@contextmanager
def lasting() -> Iterator[None]:
    """Within it a command makes objects that it needs to its end: Python looks for no cycles among them."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _interrupted_code(ctx: click.Context) -> int:
    """The exit code of an interrupted command, as shells have it: 128 and the signal's number."""
    return 128 + int(ctx.meta.get(_SIGNAL, signal.SIGINT))


def _os_message(found: str, place: str = "", cure: str = "") -> str:
    return (f"{place}: " if place else "") + found + (f"; {cure}" if cure else "")


def _os_parts(error: OSError) -> dict[str, str]:
    """The parts of the message of an error of the system."""
    parts = {} if error.filename is None else {"place": os.fsdecode(error.filename)}
    parts["found"] = error.strerror or str(error)
    cure = next((cure for numbers, cure in CURES.items() if error.errno in numbers), None)
    return parts if cure is None else parts | {"cure": cure}


class ModelFolder(click.ParamType):  # type: ignore[type-arg]
    """A model's folder; or a model on the Hub or in a bucket, which the command gets as a folder.

    With adapters, MODEL+ADAPTER, the command gets such a text, with folders in place of names elsewhere.
    """

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | Elsewhere | str:
        """The folder; if it does not exist, the model's name elsewhere, or the text with adapters as it is."""
        folder = Path(value)
        if "+" in str(value) and "://" in str(value) and name_elsewhere(str(value)) is None:
            return str(value)
        if folder.exists() or (name := name_elsewhere(str(value))) is None:
            if "://" in str(value):  # a path would lose one of the slashes
                self.fail(f"found {str(value)!r}, but there is no such folder{nearest(str(value))}", param, ctx)
            return folder
        return name


def _download(value: Any, console: Console) -> Any:
    """The value, or values, of a parameter, with folders in place of models elsewhere."""
    if isinstance(value, tuple):
        return tuple(_download(each, console) for each in value)
    if not isinstance(value, Elsewhere) and "+" not in str(value):
        return value
    from mergekit_lfm.api.arguments import model_folder

    with transfers(hidden=console.hidden):
        return model_folder(str(value), console.progress)


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


class OutFolder(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5 only
    """A folder to make; an address in a bucket stays as it is."""

    name = "path"

    def convert(self, value: Any, *_: Any) -> Path | str:
        """The folder as a path, or the address."""
        return str(value) if is_address(str(value)) else Path(value)


class Partition(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5 only
    """A part of several, as 1/4."""

    name = "i/n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """The number of the part, from 1, and that of all; a usage error for any other text."""
        number, slash, count = str(value).partition("/")
        if not (slash and number.isascii() and number.isdigit() and count.isascii() and count.isdigit()):
            self.fail(f"{value!r} is not a part: give its number and that of all, as 1/4.", param, ctx)
        if not 1 <= int(number) <= int(count):
            self.fail(f"{value} is not a part: they are 1/{count} to {count}/{count}.", param, ctx)
        return int(number), int(count)


class Size(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5 only
    """50KB, 5GB, 3GiB, or a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes; a usage error for any other text."""
        try:
            return parse_size(value)
        except PlanError as error:
            self.fail(str(error), param, ctx)
