"""`select`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.shell import Command, ModelFolder


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm select models/classifier --data pool.jsonl --most 100 -o to-label.jsonl
  mergekit-lfm select models/classifier --data pool.jsonl --change mask --diversity 0 -o ordered.jsonl""",
)
@click.argument("model", type=ModelFolder())
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), help="The pool: a .jsonl or .txt file of texts."
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The file to write.")
@click.option("--most", type=click.IntRange(min=1), help="How many lines to write. [default: all]")
@click.option(
    "--change",
    type=click.Choice(["delete", "mask"]),
    default="delete",
    help="How copies of a text are made: tokens are deleted or masked. [default: delete]",
)
@click.option(
    "--share", type=click.FloatRange(0, 1, min_open=True), default=0.2, help="Of the tokens of a copy. [default: 0.2]"
)
@click.option("--copies", type=click.IntRange(min=2), default=8, help="Copies of each text. [default: 8]")
@click.option("--entropy", type=click.FloatRange(0), default=1.0, help="Weight of unsureness. [default: 1]")
@click.option("--diversity", type=click.FloatRange(0), default=1.0, help="Weight of disagreement. [default: 1]")
@click.option(
    "--majority",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    help="Share of the copies that count: those surest of the class that most have. [default: 0.5]",
)
@click.option("--window", type=click.IntRange(min=1), help="The most tokens of a text. [default: the model's limit]")
@options.batch_size_option("the model")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Decides the changes. [default: 0]")
@options.device_option("Where the model runs")
@options.overwrite
@options.output
@click.pass_obj
def select(console: Console, /, model: Path, data: Path, out: Path, **values: Any) -> None:
    """Write the lines of a pool that the classifier MODEL would learn most from, in order.

    A text is worth a label where MODEL is unsure of changed copies of it, or says something else of each. Labels are
    not needed, and lines stay as they are. Label the first ones, tune on them, and select from the rest with the tuned
    model. Needs the extra: pip install "mergekit_lfm[models]"
    """
    from mergekit_lfm.api.select import select_examples
    from mergekit_lfm.commands.show.candidates import selected_data, selected_text

    outcome = select_examples(model, data, out, progress=console.progress, **values)
    console.conclude(selected_data(outcome), lambda: selected_text(outcome), path=out)
