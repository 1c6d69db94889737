"""`average`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.shell import Command


def _read_weights(ctx: click.Context, parameter: click.Parameter, text: str | None) -> list[float] | None:  # noqa: ARG001
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"found {text!r}, expected numbers with commas, such as 1,3") from None


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm average first.safetensors second.safetensors -o mean.safetensors
  mergekit-lfm average first.safetensors second.safetensors --weights 1,3 -o mean.safetensors""",
)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The file to write.")
@click.option("--weights", callback=_read_weights, metavar="W,W...", help="One for each file. [default: 1]")
@options.overwrite
@options.output
@click.pass_obj
def average(
    console: Console,
    /,
    files: Sequence[Path],
    out: Path,
    weights: list[float] | None,
    overwrite: bool,
) -> None:
    """Average bottleneck adapters of one model, of one method and one size, to one.

    Such adapters are made by `tune --method houlsby` and its relatives. They are not changes of weights, so that
    merges do not take them; `eval MODEL+FILE` runs one. Those that began with one --seed, on other data, average well.
    """
    from mergekit_lfm.api.attachments import average_attachments
    from mergekit_lfm.commands.show.attachments import done_data, done_text

    outcome = average_attachments(files, out, weights=weights, overwrite=overwrite)
    console.warn(outcome.warnings)
    console.conclude(done_data(outcome), lambda: done_text(outcome), path=out)
