"""`offsite emulate` and `offsite plug-in`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.options import going_on_later
from mergekit_lfm.commands.shell import Command, Group, ModelFolder


@click.group(
    cls=Group,
    epilog="""\b
Examples:
  mergekit-lfm offsite emulate models/a --ends 2 --keep 0.5 -o models/a-emulator
  mergekit-lfm tune models/a-emulator --data d.jsonl --task lm --train '*layers.0.*' --train '*layers.1.*' -o tuned
  mergekit-lfm offsite plug-in models/a tuned -o models/a-tuned""",
)
def offsite() -> None:
    """Tune a model by a shallow stand-in of it: make that, and put its tuned ends into the model."""


@offsite.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm offsite emulate models/a -o models/a-emulator
  mergekit-lfm offsite emulate models/a --ends 1 --keep 0.25 -o models/a-emulator""",
)
@click.argument("model", type=ModelFolder())
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option(
    "--ends", type=click.IntRange(min=1), default=2, help="The number of layers that stay at each end. [default: 2]"
)
@click.option(
    "--keep",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.5,
    help="Share of the layers between that stay, evenly spaced. [default: 0.5]",
)
@options.memory
@options.threads
@options.overwrite
@options.output
@click.pass_obj
def emulate(console: Console, /, model: Path, out: Path, **values: Any) -> None:
    """Write an emulator of MODEL: its ends whole, and some of the layers between.

    It prints the options of `tune` that train the ends alone, and with them the head of a classifier.
    """
    from mergekit_lfm.api.offsite import emulate_model
    from mergekit_lfm.commands.show.stand_ins import emulator_data, emulator_text

    with going_on_later(out):
        outcome = emulate_model(model, out, progress=console.progress, **values)
    console.warn(outcome.warnings)
    console.conclude(emulator_data(outcome), lambda: emulator_text(outcome), path=out)


@offsite.command(
    "plug-in",
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm offsite plug-in models/a tuned -o models/a-tuned
  mergekit-lfm offsite plug-in models/a models/a-emulator+tuned-lora -o models/a-tuned""",
)
@click.argument("model", type=ModelFolder())
@click.argument("emulator", metavar="TUNED", type=ModelFolder())
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@options.memory
@options.threads
@options.overwrite
@options.output
@click.pass_obj
def plug_in(console: Console, /, model: Path, emulator: Path, out: Path, **values: Any) -> None:
    """Write MODEL with the ends of TUNED, its emulator after `tune`.

    Their layers come from TUNED, and so does a head; the layers between are MODEL's. An emulator of another model is
    refused, and one in which more than the ends has changed.
    """
    from mergekit_lfm.api.offsite import plug_in_ends
    from mergekit_lfm.commands.show.stand_ins import plugged_data, plugged_text

    with going_on_later(out):
        outcome = plug_in_ends(model, emulator, out, progress=console.progress, **values)
    console.warn(outcome.warnings)
    console.conclude(plugged_data(outcome), lambda: plugged_text(outcome), path=out)
