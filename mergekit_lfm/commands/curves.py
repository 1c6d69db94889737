"""`curves`."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.shell import Command


@click.command(
    "curves",
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm curves tuned -o tuned.png
  mergekit-lfm curves tuned-lora tuned-full old/metrics.jsonl -o both.png""",
)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), metavar="FILE.png", help="The picture to draw."
)
@options.output
@click.pass_obj
def curves(console: Console, /, runs: tuple[Path, ...], out: Path) -> None:
    """Draw the losses and the learning rates of trainings, also of those that still run.

    RUNS are the OUT of `tune`, their OUT.training or a metrics.jsonl; all go into one picture. Thick lines are means of
    the last twentieth of the steps, marks are losses on the development set. Needs the extra: pip install
    "mergekit_lfm[plots]"
    """
    from mergekit_lfm.api.courses import read_course
    from mergekit_lfm.commands.show.plots import plot_courses

    courses = {str(run): read_course(run) for run in runs}
    plot_courses(courses, out)
    last = {name: lines[-1] for name, lines in courses.items()}
    console.conclude(
        {"out": str(out), "runs": [{"run": name, **line} for name, line in last.items()]},
        lambda: "\n".join(f"{name}: {line['step']} steps, loss {line['loss']:.4g}" for name, line in last.items()),
        path=out,
    )
