"""`meta`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.options import going_on_later
from mergekit_lfm.commands.parameters import HasParameters, method_option, parameter_options
from mergekit_lfm.commands.shell import Command
from mergekit_lfm.commands.training import data_options, step_options
from mergekit_lfm.machine.launch import rank
from mergekit_lfm.recipe.meta_algorithms import ALGORITHMS
from mergekit_lfm.recipe.registry import TUNE_METHODS


def _rows() -> str:
    return "\n".join(f"  {row.name:10} {row.summary}" for row in ALGORITHMS.values())


HELP = f"""Learn an initialisation from many tasks, from which few steps on few examples lead to a good model.

\b
Algorithms:
{_rows()}

The result is written as `tune` writes it, and is a base to tune and to merge on.

With --ways a task is an episode of so many classes of the data, drawn anew for each; without it every --data file is a
task. In each outer step --batch-size tasks adapt to their --shots by --inner-steps steps of plain descent, and are
judged by their --queries. Data are as for `tune`. Reptile's outer rate is 0.5, by plain descent without a clip, if
--learning-rate, --optimizer and --clip say nothing else.

With --test the result says how a random start, MODEL, joint training on the same examples, and the result do on the
tasks of these files: each after the steps and the rate that are best for it in one grid, on episodes of their own.

Second-order algorithms, such as maml, hold all inner steps in memory; `plan` of a recipe says how much that
is, and a step that needs more than --memory is refused with the way out.

A run that was interrupted goes on when the same command runs again. Needs the extra:
pip install "mergekit_lfm[models]"
"""


@click.command(
    cls=Command,
    help=HELP,
    epilog="""\b
Examples:
  mergekit-lfm meta models/new --data letters.npz --task classification --ways 5 --shots 1 -o start
  mergekit-lfm meta models/base --data a.jsonl --data b.jsonl --task embedding --algorithm reptile -o start
  mergekit-lfm meta models/base --data a.jsonl --data b.jsonl --task lm --algorithm reptile --on-disk -o start""",
)
@click.argument("model")
@data_options
@click.option("--algorithm", type=click.Choice([*ALGORITHMS]), default="maml", help="See above. [default: maml]")
@click.option("--ways", type=click.IntRange(min=2), help="Classes of an episode. [default: each data file is a task]")
@click.option(
    "--shots", type=click.IntRange(min=1), default=5, help="Examples to adapt on, of each class. [default: 5]"
)
@click.option(
    "--queries", type=click.IntRange(min=1), default=15, help="Examples to judge by, of each class. [default: 15]"
)
@click.option("--inner-steps", type=click.IntRange(min=1), help="Steps of adapting. [default: 5]")
@click.option(
    "--inner-rate", type=click.FloatRange(0, min_open=True), help="The learning rate of adapting. [default: 0.1]"
)
@click.option(
    "--test",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A file of tasks that are not trained on, to judge by. Can be given several times.",
)
@click.option("--episodes", type=click.IntRange(min=2), default=100, help="Episodes of the test. [default: 100]")
@click.option("--batch-size", type=click.IntRange(min=1), default=4, help="Tasks of an outer step. [default: 4]")
@click.option(
    "--on-disk",
    is_flag=True,
    help="Of reptile: a step's models are checkpoints beside OUT, which the engine merges; several processes with the "
    "same command share them.",
)
@options.step_memory
@method_option(TUNE_METHODS, "full", "The part of the model that is learned, and how.")
@parameter_options({**TUNE_METHODS, **ALGORITHMS})
@step_options
@click.pass_obj
def meta(
    console: Console,
    /,
    model: str,
    data: tuple[Path, ...],
    out: Path,
    test: tuple[Path, ...],
    episodes: int,
    **values: Any,
) -> None:
    """Learn an initialisation; the text is HELP."""
    from mergekit_lfm.api.meta import meta_train
    from mergekit_lfm.commands.show.initialisations import done_data, done_text

    owners: list[HasParameters] = [*TUNE_METHODS.values(), *ALGORITHMS.values()]
    own = {parameter.name for each in owners for parameter in each.parameters}
    parameters = {name: values.pop(name) for name in own}
    values["parameters"] = {name: value for name, value in parameters.items() if value is not None}
    with going_on_later(out):
        judged = {"data": [*test], "episodes": episodes} if test else None
        outcome = meta_train(model, data, out, test=judged, progress=console.progress, **values)
    if rank():
        return  # the first of several processes prints
    console.warn(outcome.warnings)
    console.conclude(done_data(outcome), lambda: done_text(outcome), path=out)
