"""What several commands take, and how they end when they are interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from mergekit_lfm.commands.shell import INTERRUPTED, Size
from mergekit_lfm.errors import PlanError

F = TypeVar("F", bound=Callable[..., Any])

# As `runtime.TASKS` has them, which is not imported for --help; a test compares them.
TASKS = ("lm", "classification", "embedding")


def together(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator that adds options and arguments in the order in which they are written here."""

    def decorate(command: F) -> F:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
quiet = click.option("-q", "--quiet", is_flag=True, help="Print the result, warnings and errors only.")
overwrite = click.option("--overwrite", is_flag=True, help="Replace OUT where it exists.")
no_resume = click.option("--no-resume", is_flag=True, help="Start over instead of going on with an interrupted run.")
memory = click.option(
    "--memory", type=Size(), help="Most to hold at a time. [default: a quarter of the RAM, at most 4GB]"
)
threads = click.option("--threads", type=click.IntRange(min=1), help="[default: the number of cores]")


@contextmanager
def going_on_later(ctx: click.Context, out: Path, plan: str | None = None) -> Iterator[None]:
    """On Ctrl-C, print what is kept for the next run of the same command, and end with the code for it.

    plan: the digest of a plan; if `out` holds its output, only a push was interrupted.
    """
    try:
        yield
    except KeyboardInterrupt:
        from mergekit_lfm.output.lock import lock_of
        from mergekit_lfm.store.places import partial_of

        kept = partial_of(out)
        done = f"what is done is kept in {kept}" if kept.exists() else "nothing was written"
        done = f"{out} is complete, but was not pushed" if plan and lock_of(out).get("plan") == plan else done
        click.echo(f"interrupted: {done}; run the same command again to go on", err=True)
        ctx.exit(INTERRUPTED)


@contextmanager
def needing_models() -> Iterator[None]:
    """Where the extra that loads models is not installed, the message that says how to install it."""
    try:
        yield
    except ImportError as error:
        if error.name != "transformers":
            raise
        raise PlanError(str(error)) from None
