"""`generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.options import going_on_later
from mergekit_lfm.commands.shell import Command, ModelFolder


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm generate models/teacher --data prompts.jsonl --temperature 0 -o answers.jsonl
  mergekit-lfm generate models/teacher --data prompts.jsonl --count 4 --top-p 0.9 -o answers.jsonl
  mergekit-lfm generate models/teacher --count 1000 --max-new-tokens 128 -o texts.jsonl""",
)
@click.argument("model", type=ModelFolder())
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help='The prompts: a .jsonl file with {"prompt": ...} or {"messages": [...]} on each line. [default: none; the '
    "model begins texts itself]",
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The .jsonl file to write.")
@click.option(
    "--task",
    type=click.Choice(["lm", "seq2seq"]),
    default="lm",
    help="The kind of model: lm, or seq2seq for an encoder with a decoder. [default: lm]",
)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    default=1,
    help="Texts for each prompt, or in all without --data. [default: 1]",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=256, help="The most tokens of a text. [default: 256]"
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=1.0,
    help="Scores are divided by it: below 1 texts are more likely ones; 0 takes the most likely token each time. "
    "[default: 1]",
)
@click.option("--top-k", type=click.IntRange(min=1), help="Draw among this many most likely tokens. [default: all]")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    help="Draw among the most likely tokens whose probabilities sum to this. [default: 1]",
)
@click.option(
    "--window",
    type=click.IntRange(min=1),
    help="The most tokens of a prompt with its text. [default: as many as the model takes]",
)
@options.batch_size_option("the model")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float64", "bfloat16", "float16"]),
    default="float32",
    help="The number format that the model computes in; tokens are drawn in float64. [default: float32]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Decides the random numbers. [default: 0]")
@options.device_option("Where the model runs", default=None)
@click.option("--threads", type=click.IntRange(min=1), help="The number of threads. [default: torch's choice]")
@options.overwrite
@options.output
@click.pass_obj
def generate(console: Console, /, model: Path, data: Path | None, out: Path, **values: Any) -> None:
    """Have a language model write texts, and keep them as a data file: a teacher's, for a student to be tuned on.

    A line {"prompt": ...} gets a "completion". A line {"messages": [...]} gets the assistant's next turn; one at its
    end is written anew. Without --data each line is {"text": ...}, which the model begins at its start token. `tune`
    reads OUT, and `stats` and `eval` read texts; OUT.lock.json says how it was made. An interrupted run goes on when it
    is started again. Needs the extra: pip install "mergekit_lfm[models]"
    """
    from mergekit_lfm.api.generate import generate_texts
    from mergekit_lfm.commands.show.generations import done_data, done_text

    with going_on_later(out):
        outcome = generate_texts(model, data, out, progress=console.progress, **values)
    console.warn(outcome.warnings)
    console.conclude(done_data(outcome), lambda: done_text(outcome), path=out)
