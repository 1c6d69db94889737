"""How a command meets the shell: sizes as arguments, errors as one message, exit codes."""

from __future__ import annotations

import errno
import os
from typing import Any

import click

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.sizes import parse_size

ANSWER_IS_NO = 1
BAD_INPUT = 2  # or a bad environment; also what click exits with on bad usage
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class Command(click.Command):
    """A command whose expected errors are one message and an exit code, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (FormatError, PlanError) as error:
            message = str(error)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has gone; click ends quietly
                raise
            message = _os_message(error)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        click.echo(f"error: {message}", err=True)
        ctx.exit(BAD_INPUT)


def _os_message(error: OSError) -> str:
    text = error.strerror or str(error)
    if error.filename is not None:
        text = f"{os.fsdecode(error.filename)}: {text}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        text += "; free some space and run the same command again, it goes on where it stopped"
    return text


class Size(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5 only
    """50KB, 5GB, 3GiB, or a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bytes that `value` says; a usage error where it says none."""
        try:
            return parse_size(value)
        except PlanError as error:
            self.fail(str(error), param, ctx)
