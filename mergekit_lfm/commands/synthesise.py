"""`synthesise`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.options import going_on_later
from mergekit_lfm.commands.shell import Command, ModelFolder
from mergekit_lfm.recipe.synthesise_presets import PRESETS

FILE = click.Path(path_type=Path)


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm synthesise models/resnet -o made.npz
  mergekit-lfm synthesise models/resnet --preset dfq --student models/small --student-out small-tuned -o made.npz
  mergekit-lfm synthesise models/cats models/dogs --preset amalgamation --student models/pets -o made.npz""",
)
@click.argument("teachers", metavar="TEACHER...", type=ModelFolder(), nargs=-1, required=True)
@click.option(
    "--preset", type=click.Choice([*PRESETS]), default="deepinversion", help="The way. [default: deepinversion]"
)
@click.option(
    "-o", "--out", required=True, type=FILE, help="The .npz file to write; a .png of 1 or 3 channels comes beside it."
)
@click.option("--student", type=ModelFolder(), help="A classifier of the same classes, which learns from the images.")
@click.option("--student-out", type=FILE, help="The folder to write it to. [default: OUT's name with -student]")
@click.option("--stats", type=FILE, help="Gram matrices of TEACHER, which take the place of BatchNorm's statistics.")
@click.option("--data", type=FILE, help="Some of TEACHER's own images, .npz, for records and clusters of activations.")
@click.option("--images", type=FILE, help="Images of any kind, .npz, for degan and dfnd.")
@click.option("--size", type=click.IntRange(min=1), help="Height and width. [default: the model's]")
@click.option("--low", type=float, help="The least value of a pixel. [default: the image processor's, else 0]")
@click.option("--high", type=float, help="The largest value of a pixel. [default: the image processor's, else 1]")
@click.option("--count", type=click.IntRange(min=2), help="Images that gradients make, or dfnd chooses. [default: 256]")
@click.option("--steps", type=click.IntRange(min=1), help="Steps of the student on these. [default: 1200]")
@click.option("--rounds", type=click.IntRange(min=1), help="Of a generator, or of gradients. [default: the preset's]")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Decides all random numbers. [default: 0]")
@options.device_option("Where the models run", default=None)
@click.option("--threads", type=click.IntRange(min=1), help="The number of threads. [default: torch's choice]")
@options.overwrite
@options.output
@click.pass_obj
def synthesise(console: Console, /, teachers: tuple[Path, ...], out: Path, **values: Any) -> None:
    """Make images for the classifier TEACHER without its data, and train a student on them.

    Several teachers have other classes each; the student has those of the first, then of the second, and so on.

    Presets are published ways: docs/distillation.md lists them with how well each did. Those with a generator need a
    student; the others can also make images alone. OUT.lock.json says how the images were made; an interrupted run goes
    on when it is started again. Needs the extra: pip install "mergekit_lfm[images]"
    """
    from mergekit_lfm.api.synthesise import synthesise_images
    from mergekit_lfm.commands.show.synthetic import done_data, done_text

    with going_on_later(out):
        outcome = synthesise_images(teachers, out, progress=console.progress, **values)
    console.warn(outcome.warnings)
    console.conclude(done_data(outcome), lambda: done_text(outcome), path=out)
