"""`meta-teachers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.options import going_on_later
from mergekit_lfm.commands.shell import Command
from mergekit_lfm.recipe.without_data import WITHOUT_DATA

COUNT, RATE, AMOUNT = click.IntRange(min=1), click.FloatRange(0, min_open=True), click.FloatRange(0)


def _rows() -> str:
    return "\n".join(f"  {row.name:8} {row.summary}" for row in WITHOUT_DATA.values())


HELP = f"""Make an initialisation for new tasks from models of other tasks, without their data.

MODEL gives the architecture, and the weights to begin with; each TEACHER is a model of a task of its own.

\b
Algorithms:
{_rows()}

average and dro take models of the same tensors as MODEL; dro those of at most a million numbers. purer and bidf take
classifiers of images of any architecture, with as many classes as MODEL. bidf asks its teachers for probabilities and
nothing else, and the result says how many images it asked about. An option that the algorithm does not read is refused.

The result is a model, a base to tune and to merge on. A run that was interrupted goes on when the same command runs
again. Needs the extra, but for average and dro: pip install "mergekit_lfm[models]"
"""


@click.command(
    "meta-teachers",
    cls=Command,
    help=HELP,
    epilog="""\b
Examples:
  mergekit-lfm meta-teachers models/new models/cats models/dogs -o start
  mergekit-lfm meta-teachers models/new models/cats models/dogs --algorithm purer --steps 800 -o start
  mergekit-lfm meta-teachers models/new models/cats models/dogs --algorithm bidf --directions 10 -o start""",
)
@click.argument("model")
@click.argument("teachers", metavar="TEACHER...", nargs=-1, required=True)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option(
    "--algorithm", type=click.Choice([*WITHOUT_DATA]), default="average", help="See above. [default: average]"
)
@click.option("--steps", type=COUNT, help="Steps of the training. [default: 200]")
@click.option("--batch-size", type=COUNT, help="Episodes of a step. [default: 4]")
@click.option("--learning-rate", type=RATE, help="Of the training. [default: 0.001, of dro 0.01]")
@click.option("--shots", type=COUNT, help="Images to adapt on, of each class. [default: 5]")
@click.option("--queries", type=COUNT, help="Images to judge by, of each class. [default: 15]")
@click.option("--inner-steps", type=COUNT, help="Steps of adapting. [default: 5]")
@click.option("--inner-rate", type=RATE, help="The learning rate of adapting. [default: 0.1]")
@click.option("--images", type=COUNT, help="Images of each class. [default: twice the larger of shots and queries]")
@click.option(
    "--image-steps", type=click.IntRange(min=0), help="Steps before, in which images alone change. [default: 50]"
)
@click.option("--image-rate", type=RATE, help="The rate by which images change. [default: 0.1]")
@click.option("--size", type=COUNT, help="Height and width of images. [default: the model's]")
@click.option("--low", type=float, help="The least value of a pixel. [default: the image processor's, else 0]")
@click.option("--high", type=float, help="The largest value of a pixel. [default: the image processor's, else 1]")
@click.option("--radius", type=AMOUNT, help="Of dro's ball of embeddings, which have length 1. [default: 0.5]")
@click.option("--curriculum", type=AMOUNT, help="The weight of purer's harder episodes, 0 for none. [default: 1]")
@click.option("--directions", type=COUNT, help="Directions in which bidf asks about each image. [default: 20]")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Decides all random numbers. [default: 0]")
@options.device_option("Where the models run", default=None)
@options.step_memory
@click.option("--threads", type=COUNT, help="The number of threads. [default: torch's choice]")
@options.overwrite
@options.output
@click.pass_obj
def meta_teachers(console: Console, /, model: str, teachers: tuple[str, ...], out: Path, **values: Any) -> None:
    """Make an initialisation from models; the text is HELP."""
    from mergekit_lfm.api.meta_teachers import meta_from_teachers
    from mergekit_lfm.commands.show.from_teachers import done_data, done_text

    with going_on_later(out):
        outcome = meta_from_teachers(model, teachers, out, progress=console.progress, **values)
    console.warn(outcome.warnings)
    console.conclude(done_data(outcome), lambda: done_text(outcome), path=out)
