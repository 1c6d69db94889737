"""`verify`."""

from __future__ import annotations

import json

import click

from mergekit_lfm.commands.options import as_json, quiet
from mergekit_lfm.commands.shell import ANSWER_IS_NO, Command, show, transfers
from mergekit_lfm.machine.text import printable_line


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm verify merged/quickstart
  mergekit-lfm verify me/my-merge@main""",
)
@click.argument("out")
@as_json
@quiet
@click.pass_context
def verify(ctx: click.Context, out: str, as_json: bool, quiet: bool) -> None:
    """Read a merged model again and compare it with its merge.lock.json.

    OUT is its folder, or its name on the Hub; then the files that the lock names are downloaded to the cache. Prints
    every difference, and what the lock cannot show; the exit code is 1 if there is a difference.
    """
    from mergekit_lfm.api.judge import verify_output
    from mergekit_lfm.commands.show.terminal import Terminal, count_noun

    hidden = quiet or as_json
    with transfers(hidden=hidden):
        verified = verify_output(out, progress=Terminal(hidden=hidden)).result
    problems = verified.differences
    if as_json:
        facts = {"problems": list(problems), "not_covered": list(verified.not_covered)}
        click.echo(json.dumps({"out": out, "good": not problems, **facts}))
    else:
        verdict = f"{count_noun(len(problems), 'difference')} to its lock" if problems else "good, all as its lock says"
        rest = [] if quiet else [printable_line(f"not covered: {line}") for line in verified.not_covered]
        show("\n".join([*map(printable_line, problems), f"{out}: {verdict}", *rest]))
    ctx.exit(ANSWER_IS_NO if problems else 0)
