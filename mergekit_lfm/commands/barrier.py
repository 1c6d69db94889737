"""`barrier`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.options import together
from mergekit_lfm.commands.shell import Command, ModelFolder

WINDOW_HELP = "Cut the data into pieces of this many tokens. [default: as many as the model takes; for lm at most {}]"

# Options of `barrier` and `repair`, which both run a pair of models.
running = together(
    click.option(
        "--align",
        type=click.Path(path_type=Path),
        help="A transform file that `align` wrote: the second model is rewritten by it before anything else.",
    ),
    options.batch_size_option("a model"),
    options.device_option("Where the models run"),
    options.output,
)


@click.command(
    "barrier",
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm barrier models/a models/b --text news.txt
  mergekit-lfm barrier models/a models/b --data test.jsonl --task classification --plot line.png
  mergekit-lfm barrier models/a models/b --text news.txt --align b-to-a.safetensors""",
)
@click.argument("first", metavar="A", type=ModelFolder())
@click.argument("second", metavar="B", type=ModelFolder())
@click.option("--data", type=click.Path(path_type=Path), help="The data file to judge on: .jsonl, .txt or .npz.")
@click.option(
    "--text", type=click.Path(path_type=Path), help="In place of --data, a file of UTF-8 text for language models."
)
@click.option(
    "--task",
    type=click.Choice(["lm", "classification"]),
    help="The kind of models: lm or classification. [default: lm, for --text]",
)
@click.option(
    "--points",
    type=click.IntRange(min=3),
    default=11,
    help="The number of models on the line to judge, A and B among them. [default: 11]",
)
@click.option(
    "--reset-batchnorm",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Estimate BatchNorm's running statistics anew on this data file for each model between A and B. "
    "[default: interpolate them]",
)
@click.option("--window", type=click.IntRange(min=1), help=WINDOW_HELP.format(2048))
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Also draw loss and accuracy.")
@running
@click.pass_obj
def barrier(
    console: Console,
    /,
    first: Path,
    second: Path,
    data: Path | None,
    text: Path | None,
    task: str | None,
    plot: Path | None,
    **values: Any,
) -> None:
    """Judge the models on the straight line from A to B.

    The models (1 - t) A + t B for t from 0 to 1. Loss: mean cross entropy in nats, of the next token or of the label;
    accuracy: how often the right one is the most likely. The barrier compares the worst of them with a straight line
    between the numbers of A and B. A barrier near 0 means that an average of the two is as good as they are. Needs the
    extra: pip install "mergekit_lfm[models]"; for plots "mergekit_lfm[plots]"
    """
    from mergekit_lfm.api.judge import measure_barrier
    from mergekit_lfm.commands.show.barrier import line_data, line_text
    from mergekit_lfm.commands.show.plots import check_plot, plot_lines

    judged_on = data or text
    if judged_on is None or (data and text):
        raise click.UsageError("Give --text FILE, or --data FILE with --task.")
    if data and task is None:
        raise click.UsageError("Give --task with --data: what do the models do with it?")
    if text and task == "classification":
        raise click.UsageError("--text is for language models; give --data with --task classification.")
    if plot:
        check_plot(plot)
    line = measure_barrier(first, second, judged_on, task=task or "lm", progress=console.progress, **values).result
    if plot:
        plot_lines({"": line}, plot, ends=(first.name, second.name))
    console.conclude(line_data(line), lambda: line_text(line))
