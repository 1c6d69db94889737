"""`student`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.shell import Command


def _read_layers(ctx: click.Context, parameter: click.Parameter, text: str | None) -> list[int | str] | None:  # noqa: ARG001
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    return None if text is None else [int(part) if part.isdecimal() else part for part in parts]


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm student models/teacher --layers 0,2,4 -o models/student
  mergekit-lfm student models/teacher --keep 0.5 --mlp 0.5 -o models/student
  mergekit-lfm student models/teacher --mlp 0.75 --stats gram.safetensors -o models/pruned
  mergekit-lfm student models/teacher --keep 0.5 --random --seed 1 -o models/new""",
)
@click.argument("model")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option(
    "--layers",
    callback=_read_layers,
    metavar="NUMBERS",
    help="Numbers of layers, from 0, with commas: these, in this order; a layer may be there twice.",
)
@click.option(
    "--keep", type=float, help="Share of the layers that stay, evenly spaced from the first to the last, at least one."
)
@click.option(
    "--mlp", type=float, help="Share of the hidden units of each MLP that stay: those of the largest importance."
)
@click.option(
    "--stats",
    metavar="FILE",
    help="Rank units by Gram matrices of MODEL, of `stats gram`, in place of the norms of their weights.",
)
@click.option("--random", is_flag=True, help="New weights, as transformers draws them; MODEL needs no weights then.")
@click.option("--seed", type=click.IntRange(min=0), help="Of the new weights. [default: 0]")
@options.overwrite
@options.output
@click.pass_obj
def student(console: Console, /, model: str, out: Path, **values: Any) -> None:
    """Write a smaller MODEL: some of its layers, narrower MLPs, or new weights; to distil into, or a pruned one.

    At least one of --layers, --keep, --mlp and --random is needed, and all go together. Nothing is trained. MODEL is a
    folder, a name on the Hub, or MODEL+ADAPTER. --random needs the extra: pip install "mergekit_lfm[models]"
    """
    from mergekit_lfm.api.students import make_student
    from mergekit_lfm.commands.show.students import done_data, done_text

    outcome = make_student(model, out, **values)
    console.warn(outcome.warnings)
    console.conclude(done_data(outcome), lambda: done_text(outcome), path=out)
