"""`repair`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.barrier import WINDOW_HELP, running
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.shell import Command, ModelFolder
from mergekit_lfm.runtime.tasks import TASKS


@click.command(
    "repair",
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm repair merged/ab --ends models/a models/b --data a.txt --task lm -o merged/ab-repaired
  mergekit-lfm repair merged/ab --ends models/a models/b --data x.jsonl --task classification \\
    --align b-to-a.safetensors -o merged/ab-repaired""",
)
@click.argument("merged", type=ModelFolder())
@click.option(
    "--ends",
    required=True,
    nargs=2,
    metavar="A B",
    type=ModelFolder(),
    help="The two models that were merged.",
)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="The data file: .jsonl, .txt or .npz.")
@click.option("--task", required=True, type=click.Choice([*TASKS]), help="The kind of models.")
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to write the repaired model to."
)
@click.option(
    "--weights",
    nargs=2,
    metavar="A B",
    type=float,
    default=(0.5, 0.5),
    help="The weights with which A and B were merged. [default: 0.5 0.5]",
)
@click.option("--window", type=click.IntRange(min=1), help=WINDOW_HELP.format(512))
@options.overwrite
@running
@click.pass_obj
def repair(
    console: Console, /, merged: Path, ends: tuple[Path, Path], out: Path, overwrite: bool, **values: Any
) -> None:
    """Give MERGED's hidden units the mean and spread that they have in its ends.

    Units of an average of two models vary less than in either, so that the layers that read them get too little. Every
    layer with a bias that writes hidden units of its own is scaled and shifted, first to last, and BatchNorm's running
    statistics are estimated anew. Data without labels do. Needs the extra: pip install "mergekit_lfm[models]"
    """
    from mergekit_lfm.api.judge import repair_model
    from mergekit_lfm.commands.show.barrier import repaired_data, repaired_text
    from mergekit_lfm.commands.show.outcomes import outcome_data

    outcome = repair_model(merged, ends, out=out, overwrite=overwrite, progress=console.progress, **values)
    repaired = outcome.result
    console.conclude(outcome_data(outcome) | repaired_data(repaired), lambda: repaired_text(repaired), path=out)
