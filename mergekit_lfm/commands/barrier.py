"""`barrier` and `repair`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.options import TASKS, needing_models, together
from mergekit_lfm.commands.shell import Command, ModelFolder
from mergekit_lfm.errors import PlanError

ALIGN_HELP = "A transform file of `align`: rewrites the second model before anything else."

WINDOW_HELP = "Most tokens at a time. [default: the model's; for lm at most {}]"

# How both run their models.
running = together(
    click.option("--align", "transform", type=click.Path(path_type=Path), help=ALIGN_HELP),
    click.option("--batch-size", type=click.IntRange(min=1), default=16, help="Examples at a time. [default: 16]"),
    click.option("--device", default="cpu", help="Where the models run: cpu, cuda, cuda:1, auto. [default: cpu]"),
    options.as_json,
    options.quiet,
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
@click.option("--data", type=click.Path(path_type=Path), help="A data file of the task: .jsonl, .txt or .npz.")
@click.option("--text", type=click.Path(path_type=Path), help="A file of UTF-8 text, for language models.")
@click.option("--task", type=click.Choice(TASKS[:2]), help="What the models do with --data. [default: lm, for --text]")
@click.option("--points", type=click.IntRange(min=3), default=11, help="Models to judge, the ends too. [default: 11]")
@click.option(
    "--reset-batchnorm",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Re-estimate BatchNorm's running statistics on this data, between the ends. [default: interpolate them]",
)
@click.option("--window", type=click.IntRange(min=1), help=WINDOW_HELP.format(2048))
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw loss and accuracy.")
@running
def barrier(
    first: Path,
    second: Path,
    data: Path | None,
    text: Path | None,
    task: str | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Judge the models on the straight line from A to B.

    The models (1 - t) A + t B for t from 0 to 1. Loss: mean cross entropy in nats, of the next token or of the label;
    accuracy: how often the right one is the most likely. The barrier is by how much the worst of them is worse than
    what lies on a straight line between the numbers of A and B. Near 0 says that an average of the two is as good as
    they are. Needs the extra: pip install "mergekit_lfm[models]"; for plots "mergekit_lfm[plots]"
    """
    from mergekit_lfm.commands.show.barrier import line_data, line_text
    from mergekit_lfm.commands.show.plots import check_plot, plot_lines
    from mergekit_lfm.commands.show.terminal import counter

    if bool(data) == bool(text):
        raise click.UsageError("Give --text FILE, or --data FILE with --task.")
    if data and task is None:
        raise click.UsageError("Give --task with --data: what do the models do with it?")
    if text and task == "classification":
        raise click.UsageError("--text is for language models; give --data with --task classification.")
    if plot:
        check_plot(plot)
    with needing_models(), counter("points", "judging", hidden=quiet or as_json) as progress:
        from mergekit_lfm.judge.barrier import barrier as judged

        line = judged(first, second, data or text, task=task or "lm", progress=progress, **given)  # type: ignore[arg-type]
    if plot:
        plot_lines({"": line}, plot, ends=(first.name, second.name))
    click.echo(json.dumps(line_data(line)) if as_json else line_text(line))


@click.command(
    "repair",
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm repair merged/ab --ends models/a models/b --data a.txt --task lm -o merged/ab-repaired
  mergekit-lfm repair merged/ab --ends models/a models/b --data x.jsonl --task classification
    --align b-to-a.safetensors -o merged/ab-repaired""",
)
@click.argument("merged", type=ModelFolder())
@click.option(
    "--ends",
    required=True,
    nargs=2,
    metavar="A B",
    type=ModelFolder(),
    help="The models that were merged.",
)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="The data file: .jsonl, .txt or .npz.")
@click.option("--task", required=True, type=click.Choice(TASKS), help="What the models are.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option(
    "--weights",
    nargs=2,
    metavar="A B",
    type=float,
    default=(0.5, 0.5),
    help="How much of each end MERGED has. [default: 0.5 0.5]",
)
@click.option("--window", type=click.IntRange(min=1), help=WINDOW_HELP.format(512))
@options.overwrite
@running
def repair(
    merged: Path, ends: tuple[Path, Path], out: Path, overwrite: bool, as_json: bool, quiet: bool, **given: Any
) -> None:
    """Give MERGED's hidden units the mean and spread that they have in its ends.

    Units of an average of two models vary less than in either: what reads them gets too little. Every layer with a bias
    that writes hidden units of its own is scaled and shifted, first to last, and BatchNorm's running statistics are
    re-estimated. Data without labels do. Needs the extra: pip install "mergekit_lfm[models]"
    """
    from mergekit_lfm.commands.show.barrier import repaired_data, repaired_text
    from mergekit_lfm.commands.show.terminal import counter

    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise PlanError(f"{out} exists; choose another output, or use --overwrite")
    with needing_models(), counter("examples", "repairing", hidden=quiet or as_json) as progress:
        from mergekit_lfm.repair import repair as repaired

        done = repaired(merged, ends, out=out, overwrite=overwrite, progress=progress, **given)
    if as_json:
        click.echo(json.dumps({"out": str(out), **repaired_data(done)}))
        return
    if not quiet:
        click.echo(repaired_text(done), err=True)
    click.echo(out)
