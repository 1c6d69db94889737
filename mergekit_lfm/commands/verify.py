"""`verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import ANSWER_IS_NO, Console
from mergekit_lfm.commands.shell import Command, transfers
from mergekit_lfm.machine.text import printable_line


class Sample(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5 only
    """A number, or "all"."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Literal["all"]:
        """The number."""
        return "all" if value == "all" else click.IntRange(min=0).convert(value, param, ctx)


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm verify merged/quickstart
  mergekit-lfm verify merged/quickstart --against-inputs recipes/quickstart.yaml
  mergekit-lfm verify me/my-merge@main""",
)
@click.argument("out")
@click.option(
    "--against-inputs",
    metavar="RECIPE",
    type=click.Path(path_type=Path),
    help="Read the models of the recipe again, too, and compute some tensors of OUT again.",
)
@click.option(
    "--sample",
    type=Sample(),
    default=8,
    help="The number of tensors to compute again, or all. [default: 8]",
)
@options.max_shard_size
@options.seed
@options.heads
@options.device_option("Where to compute", default=None, otherwise="the recipe's, else cpu")
@options.memory
@options.threads
@options.output
@click.pass_obj
def verify(
    console: Console,
    /,
    out: str,
    against_inputs: Path | None,
    sample: int | Literal["all"],
    max_shard_size: int | None,
    seed: int | None,
    heads: Literal["base", "drop"] | None,
    device: str | None,
    memory: int | None,
    threads: int | None,
) -> None:
    """Read a merged model or a new adapter again and compare it with its merge.lock.json or adapter.lock.json.

    OUT is its folder, or its name on the Hub; then the files that the lock names are downloaded to the cache. Prints
    every difference, and what the lock cannot show; the exit code is 1 if there is a difference. With --against-inputs
    the other options are those that the merge was given; the exit code is 2 if OUT is not the recipe's output.
    """
    from mergekit_lfm.api.verify import verify_output
    from mergekit_lfm.commands.show.outcomes import outcome_data
    from mergekit_lfm.commands.show.terminal import count_noun

    with transfers(hidden=console.hidden):
        how: dict[str, Any] = {"max_shard_size": max_shard_size, "seed": seed, "heads": heads}
        how |= {"device": device, "memory": memory, "threads": threads, "progress": console.progress}
        outcome = verify_output(out, against_inputs=against_inputs, sample=sample, **how)
    verified, problems = outcome.result, outcome.result.differences

    def text() -> str:
        verdict = f"{count_noun(len(problems), 'difference')} to its lock" if problems else "good, all as its lock says"
        if against_inputs is not None and not problems:
            verdict += f" and its inputs give; {count_noun(len(verified.recomputed), 'tensor')} computed again"
        rest = [] if console.quiet else [printable_line(f"not covered: {line}") for line in verified.not_covered]
        return "\n".join([*map(printable_line, problems), f"{out}: {verdict}", *rest])

    data = {**outcome_data(outcome), "out": out, "good": not problems, "bytes_read": verified.bytes_read}
    data |= {"problems": list(problems), "not_covered": list(verified.not_covered)}
    data |= {} if against_inputs is None else {"recomputed": list(verified.recomputed)}
    console.conclude(data, text, code=ANSWER_IS_NO if problems else 0)
