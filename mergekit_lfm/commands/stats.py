"""`stats gram`, `stats fisher` and `stats cross`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.options import TASKS, going_on_later, together
from mergekit_lfm.commands.shell import Command, ModelFolder, Size


@click.group(
    epilog="""\b
Examples:
  mergekit-lfm stats gram models/a --data a.jsonl --task classification -o a.safetensors
  mergekit-lfm stats fisher --help"""
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
        type=click.Choice(TASKS),
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
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        default=16,
        help="The number of examples that the model reads at once. [default: 16]",
    ),
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
    click.option(
        "--device", help="Where the model runs: cpu, cuda, cuda:1, or auto for a GPU if there is one. [default: cpu]"
    ),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float64", "bfloat16", "float16", "auto"]),
        default="float32",
        help="The number format that the model computes in; auto is the one it is saved in. Sums are float64. "
        "[default: float32]",
    ),
    options.overwrite,
    options.no_resume,
    options.as_json,
    options.quiet,
)


@stats.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm stats gram models/a --data a.jsonl --task classification -o a.safetensors
  mergekit-lfm stats gram models/a --data a.txt --task lm --layers mlp -o a.safetensors""",
)
@click.argument("model", type=ModelFolder())
@collecting
@click.pass_context
def gram(ctx: click.Context, /, model: Path, **values: Any) -> None:
    """Collect the second moments of the inputs of MODEL's linear layers.

    For `merge_method: regmean`, and for `edit`. For every Linear and Conv1D the mean over tokens of x x', where x is
    its input with a 1 at the end. Layers that read the same input share one entry.
    """
    _collect(ctx, "gram", model, **values)


@stats.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm stats fisher models/a --data a.jsonl --task classification -o a.safetensors
  mergekit-lfm stats fisher models/a --data a.txt --task lm --labels true -o a.safetensors""",
)
@click.argument("model", type=ModelFolder())
@click.option(
    "--labels",
    type=click.Choice(["expected", "sampled", "true"]),
    help="The labels whose gradients are taken: expected averages over all classes, sampled draws from the model's own "
    "predictions, true takes those of the data. [default: expected for classification, else sampled]",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=1,
    help="For --labels sampled: the number of draws for each example. [default: 1]",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    default=0,
    help="For --labels sampled: the number from which the draws are made; the same one gives the same. [default: 0]",
)
@collecting
@click.pass_context
def fisher(ctx: click.Context, /, model: Path, **values: Any) -> None:
    """Collect how much each parameter of MODEL matters to its predictions: the diagonal Fisher information.

    For `merge_method: fisher`. For every parameter the mean over examples of the squared gradient of the
    log-probability of a label, each example by itself.
    """
    _collect(ctx, "fisher", model, **values)


@stats.command(
    cls=Command,
    epilog="""\b
Example:
  mergekit-lfm stats cross models/a models/b --data a.jsonl --task classification -o ab.safetensors""",
)
@click.argument("model", type=ModelFolder())
@click.argument("other", type=ModelFolder())
@collecting
@click.pass_context
def cross(ctx: click.Context, /, model: Path, **values: Any) -> None:
    """Collect the cross moments of the inputs of the same layers of two models.

    For `align --stats`, which matches the units of MODEL with those of OTHER by their responses to the same data. For
    every layer of both, the mean over tokens of x y', where x and y are its inputs in the two models, each with a 1 at
    the end.
    """
    _collect(ctx, "cross", model, **values)


def _collect(
    ctx: click.Context,
    kind: Literal["gram", "fisher", "cross"],
    model: Path,
    *,
    data: Path,
    out: Path,
    no_resume: bool,
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Collect, and show the result. values: more options of `collect_stats`, by their names there."""
    from mergekit_lfm.api.stats import collect_stats
    from mergekit_lfm.commands.show.files import statistics_data, statistics_text
    from mergekit_lfm.commands.show.terminal import Terminal

    with going_on_later(ctx, out):
        outcome = collect_stats(
            kind, model, data, out, resume=not no_resume, progress=Terminal(hidden=quiet or as_json), **values
        )
    facts = statistics_data(outcome.result)
    if as_json:
        click.echo(json.dumps({"out": str(out), "already_there": outcome.already_there, **facts}))
        return
    if not quiet:
        if outcome.already_there:
            click.echo("already there: these very statistics; nothing was done", err=True)
        click.echo(statistics_text(facts), err=True)
    click.echo(out)
