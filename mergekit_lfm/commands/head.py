"""`head`."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.shell import Command


def _read_labels(ctx: click.Context, parameter: click.Parameter, text: str) -> int | list[str]:  # noqa: ARG001
    return int(text) if text.removeprefix("-").isdecimal() else [name.strip() for name in text.split(",")]


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm head models/encoder --labels 4 -o models/classifier
  mergekit-lfm head models/encoder --labels docs,code,other -o models/classifier""",
)
@click.argument("model")
@click.option(
    "--labels", required=True, callback=_read_labels, metavar="N|NAMES", help="Their number, or names with commas."
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the new weights. [default: 0]")
@options.overwrite
@options.output
@click.pass_obj
def head(
    console: Console, /, model: str, labels: int | list[str], out: Path, seed: int, overwrite: bool, **_: object
) -> None:
    """Give MODEL a new head for labels, of random weights: a classifier to tune; with one label, for regression.

    An old head is dropped. The result is the base of all that is tuned from it: patches, adapters and merges are about
    its tensors. MODEL is a folder, a name on the Hub, or MODEL+ADAPTER. Needs the extra: pip install
    "mergekit_lfm[models]"
    """
    from mergekit_lfm.api.heads import add_head
    from mergekit_lfm.commands.show.heads import done_data, done_text

    outcome = add_head(model, out, labels=labels, seed=seed, overwrite=overwrite)
    console.warn(outcome.warnings)
    console.conclude(done_data(outcome), lambda: done_text(outcome), path=out)
