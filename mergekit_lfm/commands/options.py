"""Options that several commands take, and the message of a command that is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from mergekit_lfm.commands.shell import Size
from mergekit_lfm.version import __version__

F = TypeVar("F", bound=Callable[..., Any])


def together(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator that adds options and arguments in the order in which they are written here."""

    def decorate(command: F) -> F:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def _print_version(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:  # noqa: ARG001
    if not wanted or ctx.resilient_parsing:
        return
    from importlib.metadata import version

    click.echo(f"mergekit_lfm {__version__}, torch {version('torch')}")
    ctx.exit()


version = click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the versions of mergekit_lfm and of torch.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result, or the error, as one JSON object.")
step_memory = click.option(
    "--memory",
    type=Size(),
    help="The most memory that a step may need by its estimate, such as 8GB. [default: the machine's]",
)
# Where the words of a command go that may take long. They are those of its `Console`.
output = together(
    as_json,
    click.option("-q", "--quiet", is_flag=True, help="Print only the result, warnings and errors."),
    click.option(
        "--log",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Append notices, warnings, progress and the result or error to this file, lines with their time in UTC.",
    ),
    click.option(
        "--report",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write the object of --json to this file when the command ends, also with an error; replaces an earlier "
        "report.",
    ),
)
overwrite = click.option(
    "--overwrite",
    is_flag=True,
    help="Write the output even if it exists; an earlier one is replaced.",
)
no_resume = click.option(
    "--no-resume", is_flag=True, help="Start over: delete the work of an interrupted run instead of going on with it."
)
memory = click.option(
    "--memory",
    type=Size(),
    help="The most memory that the work may take, such as 2GB. [default: a quarter of the RAM, at most 4GB]",
)
threads = click.option(
    "--threads", type=click.IntRange(min=1), help="The number of threads that compute. [default: the number of cores]"
)
max_shard_size = click.option(
    "--max-shard-size",
    type=Size(),
    help="Split the result into files of at most this size, such as 5GB. [default: the files of the base model]",
)
seed = click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    help="The number from which random methods draw; the same one gives the same bytes. [default: the recipe's]",
)

heads = click.option(
    "--heads",
    type=click.Choice(["base", "drop"]),
    help="Of models with different heads, base keeps the base model's, drop leaves all out. [default: the recipe's]",
)


def device_option(sentence: str, default: str | None = "cpu", otherwise: str = "cpu") -> Callable[[F], F]:
    """The option `--device`. sentence: what happens there. otherwise: the default in words."""
    text = f"{sentence}: cpu, cuda, cuda:1, or auto for a GPU if there is one. [default: {otherwise}]"
    return click.option("--device", default=default, help=text)


def batch_size_option(reader: str) -> Callable[[F], F]:
    """The option `--batch-size`."""
    text = f"The number of examples that {reader} reads at once. [default: 16]"
    return click.option("--batch-size", type=click.IntRange(min=1), default=16, help=text)


@contextmanager
def going_on_later(out: Path, plan: str | None = None) -> Iterator[None]:
    """Add to Ctrl-C, SIGTERM or SIGHUP where the same command goes on.

    plan: the digest of a plan; if `out` holds its output, only a push was interrupted.
    """
    try:
        yield
    except KeyboardInterrupt:
        from mergekit_lfm.output.lock import lock_of
        from mergekit_lfm.store.places import partial_of

        partial = partial_of(out)
        state = f"the finished part is in {partial}" if partial.exists() else "nothing was written"
        state = f"{out} is complete, but was not pushed" if plan and lock_of(out).get("plan") == plan else state
        raise KeyboardInterrupt(f"interrupted: {state}; run the same command again to go on") from None
