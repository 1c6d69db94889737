"""`stats`, with a command for every kind of statistic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.options import going_on_later, together
from mergekit_lfm.commands.parameters import parameter_options
from mergekit_lfm.commands.shell import Command, Group, ModelFolder, Size
from mergekit_lfm.methods.kinds import StatisticMethod
from mergekit_lfm.recipe.registry import STATISTIC_METHODS
from mergekit_lfm.runtime.tasks import TASKS


@click.group(
    cls=Group,
    epilog="""\b
Examples:
  mergekit-lfm stats gram models/a --data a.jsonl --task classification -o a.safetensors
  mergekit-lfm stats fisher --help""",
)
def stats() -> None:
    """Run a model on data, and write what merges, alignments and edits need to know of it to a file.

    The data are .jsonl, lines {"text": ...} with a "label" where there is one; .txt, a text on each line (for lm one
    document); or .npz, arrays named as the model's inputs. Needs the extra: pip install "mergekit_lfm[models]"
    """


# Options of all kinds of statistics.
collecting = together(
    click.option("--data", required=True, type=click.Path(path_type=Path), help="The data file: .jsonl, .txt or .npz."),
    click.option(
        "--task",
        required=True,
        type=click.Choice([*TASKS]),
        help="The kind of model: lm, classification or embedding (a sentence encoder).",
    ),
    click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The statistics file to write."),
    click.option(
        "--layers",
        multiple=True,
        metavar="TEXT",
        help="Only layers (fisher: tensors) with TEXT in their name. Can be given several times. [default: all]",
    ),
    click.option(
        "--max-examples",
        type=click.IntRange(min=1),
        help="Read only this many examples, the first ones. [default: all]",
    ),
    click.option(
        "--window",
        type=click.IntRange(min=1),
        help="Cut examples after this many tokens. [default: as many as the model takes; for lm at most 512]",
    ),
    options.batch_size_option("the model"),
    click.option(
        "--memory",
        type=Size(),
        help="The most memory that the sums may take; the model and a batch come on top. With less there are more "
        "passes over the data. [default: a quarter of the RAM, at most 4GB]",
    ),
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        help="The number of threads that the model runs with. [default: torch's choice]",
    ),
    options.device_option("Where the model runs", default=None),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float64", "bfloat16", "float16", "auto"]),
        default="float32",
        help="The number format that the model computes in; auto is the one it is saved in. Sums are float64. "
        "[default: float32]",
    ),
    options.overwrite,
    options.no_resume,
    options.output,
)


def _command(method: StatisticMethod[Any]) -> click.Command:
    """The command that collects one statistic."""
    models = " ".join(("models/a", "models/b")[: method.models])
    examples = "\n".join(f"  mergekit-lfm stats {method.name} {models} {options}" for options in method.examples)
    title = "Example" if len(method.examples) == 1 else "Examples"

    @click.command(
        method.name,
        cls=Command,
        help=f"Collect {method.summary}.\n\n{method.doc}",
        epilog=f"\b\n{title}:\n{examples}",
    )
    @together(*(click.argument(label, type=ModelFolder()) for label in ("model", "other")[: method.models]))
    @parameter_options({method.name: method})
    @collecting
    @click.pass_obj
    def command(console: Console, /, model: Path, **values: Any) -> None:
        _collect(console, method.name, model, **values)

    return command


def _collect(
    console: Console,
    kind: str,
    model: Path,
    *,
    data: Path,
    out: Path,
    no_resume: bool,
    **values: Any,
) -> None:
    """Collect, and show the result. values: more options of `collect_stats`, by their names there."""
    from mergekit_lfm.api.stats import collect_stats
    from mergekit_lfm.commands.show.files import statistics_data, statistics_text
    from mergekit_lfm.commands.show.outcomes import outcome_data

    chosen = {name: value for name, value in values.items() if value is not None}
    with going_on_later(out):
        outcome = collect_stats(kind, model, data, out, resume=not no_resume, progress=console.progress, **chosen)
    if outcome.already_there:
        console.say("already there: these very statistics; nothing was done")
    facts = statistics_data(outcome.result)
    console.conclude(outcome_data(outcome) | facts, lambda: statistics_text(facts), path=out)


for method in STATISTIC_METHODS.values():
    stats.add_command(_command(method))
