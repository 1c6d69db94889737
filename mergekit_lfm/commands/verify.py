"""`verify`."""

from __future__ import annotations

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import ANSWER_IS_NO, Console
from mergekit_lfm.commands.shell import Command, transfers
from mergekit_lfm.machine.text import printable_line


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm verify merged/quickstart
  mergekit-lfm verify me/my-merge@main""",
)
@click.argument("out")
@options.output
@click.pass_obj
def verify(console: Console, /, out: str) -> None:
    """Read a merged model again and compare it with its merge.lock.json.

    OUT is its folder, or its name on the Hub; then the files that the lock names are downloaded to the cache. Prints
    every difference, and what the lock cannot show; the exit code is 1 if there is a difference.
    """
    from mergekit_lfm.api.judge import verify_output
    from mergekit_lfm.commands.show.outcomes import outcome_data
    from mergekit_lfm.commands.show.terminal import count_noun

    with transfers(hidden=console.hidden):
        outcome = verify_output(out, progress=console.progress)
    verified, problems = outcome.result, outcome.result.differences

    def text() -> str:
        verdict = f"{count_noun(len(problems), 'difference')} to its lock" if problems else "good, all as its lock says"
        rest = [] if console.quiet else [printable_line(f"not covered: {line}") for line in verified.not_covered]
        return "\n".join([*map(printable_line, problems), f"{out}: {verdict}", *rest])

    data = {**outcome_data(outcome), "out": out, "good": not problems, "bytes_read": verified.bytes_read}
    data |= {"problems": list(problems), "not_covered": list(verified.not_covered)}
    console.conclude(data, text, code=ANSWER_IS_NO if problems else 0)
