"""`export`."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.shell import Command


@click.command(
    cls=Command,
    epilog="""\b
Example:
  mergekit-lfm export models/base+docs-houlsby.safetensors -o models/docs""",
)
@click.argument("model", metavar="MODEL+FILE")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@options.overwrite
@options.output
@click.pass_obj
def export(console: Console, /, model: str, out: Path, overwrite: bool) -> None:
    """Write a model with a bottleneck adapter as a folder that transformers loads.

    The adapter is not a change of weights, so that the folder has the code of its modules, too, in
    modeling_attached.py: `from_pretrained(OUT, trust_remote_code=True)` runs it, and needs torch and transformers
    alone. Here no code of a model is run: judge MODEL+FILE. Needs the extra: pip install "mergekit_lfm[models]"
    """
    from mergekit_lfm.api.export_attached import export_attached
    from mergekit_lfm.commands.show.attachments import exported_data, exported_text

    outcome = export_attached(model, out, overwrite=overwrite)
    console.warn(outcome.warnings)
    console.conclude(exported_data(outcome), lambda: exported_text(outcome), path=out)
