"""`stats gram`, `stats fisher` and `stats cross`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.options import TASKS, going_on_later, needing_models, together
from mergekit_lfm.commands.shell import Command, ModelFolder, Size


@click.group(
    epilog="""\b
Examples:
  mergekit-lfm stats gram models/a --data a.jsonl --task classification -o a.safetensors
  mergekit-lfm stats fisher --help"""
)
def stats() -> None:
    """Collect what a model knows about its data, as a file; merges read gram and fisher.

    The data are .jsonl, lines {"text": ...} with a "label" where there is one; .txt, a text on each line (for lm one
    document); or .npz, arrays named as the model's inputs. Needs the extra: pip install "mergekit_lfm[models]"
    """


# What all kinds of statistics take alike.
collecting = together(
    click.option("--data", required=True, type=click.Path(path_type=Path), help="The data file: .jsonl, .txt or .npz."),
    click.option(
        "--task",
        required=True,
        type=click.Choice(TASKS),
        help="What the model is: lm, classification or embedding (a sentence encoder).",
    ),
    click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The file to write."),
    click.option(
        "--layers",
        multiple=True,
        metavar="TEXT",
        help="Only layers (fisher: tensors) with TEXT in their name. Can be given several times. [default: all]",
    ),
    click.option("--max-examples", type=click.IntRange(min=1), help="Take the first ones only. [default: all]"),
    click.option(
        "--window",
        type=click.IntRange(min=1),
        help="Most tokens of an example. [default: the model's; for lm at most 512]",
    ),
    click.option("--batch-size", type=click.IntRange(min=1), default=16, help="Examples at a time. [default: 16]"),
    click.option(
        "--memory",
        type=Size(),
        help="Most for sums; the model and a batch come on top. [default: a quarter of the RAM, at most 4GB]",
    ),
    click.option("--threads", type=click.IntRange(min=1), help="Of the processor. [default: as torch has it]"),
    click.option("--device", help="Where the model runs: cpu, cuda, cuda:1, auto. [default: cpu]"),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float64", "bfloat16", "float16", "auto"]),
        default="float32",
        help="What the model computes in; auto as it is saved. Sums are float64. [default: float32]",
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
def gram(ctx: click.Context, /, model: Path, **given: Any) -> None:
    """Second moments of what the linear layers of MODEL take in.

    For `merge_method: regmean`. Of every Linear and Conv1D the mean over tokens of x x', where x is its input with a 1
    at the end. Layers that read the same input share one entry.
    """
    _collect(ctx, "gram", model, **given)


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
    help="Expectation over all classes, draws from the model, or the data's own. [default: expected for "
    "classification, else sampled]",
)
@click.option("--samples", type=click.IntRange(min=1), default=1, help="Draws per example, if sampled. [default: 1]")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, help="Of the drawn labels. [default: 0]")
@collecting
@click.pass_context
def fisher(ctx: click.Context, /, model: Path, **given: Any) -> None:
    """How much each parameter of MODEL matters to what it says: the diagonal Fisher information.

    For `merge_method: fisher`. Of every parameter the mean over examples of the squared gradient of the log-probability
    of a label, each example by itself.
    """
    _collect(ctx, "fisher", model, **given)


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
def cross(ctx: click.Context, /, model: Path, **given: Any) -> None:
    """Cross moments of what the same layers of two models take in.

    For `align`: to match the units of MODEL with those of OTHER, by how they respond to the same data. Of every layer
    that both have the mean over tokens of x y', where x and y are its inputs in the two models, each with a 1 at the
    end.
    """
    _collect(ctx, "cross", model, **given)


def _collect(
    ctx: click.Context,
    kind: Literal["gram", "fisher", "cross"],
    model: Path,
    *,
    data: Path,
    out: Path,
    threads: int | None,
    no_resume: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Collect, and show the result; `given` are options of collect_stats by their names there."""
    import torch

    from mergekit_lfm.collect import collect_stats
    from mergekit_lfm.commands.show.files import statistics_data, statistics_text
    from mergekit_lfm.commands.show.terminal import counter

    if threads is not None:
        torch.set_num_threads(threads)
    before = _state(out)
    with (
        needing_models(),
        going_on_later(ctx, out),
        counter("examples", "collecting", hidden=quiet or as_json) as progress,
    ):
        statistics = collect_stats(kind, model, data, out, resume=not no_resume, progress=progress, **given)
    found = statistics_data(statistics)
    already_there = _state(out) == before
    if as_json:
        click.echo(json.dumps({"out": str(out), "already_there": already_there, **found}))
        return
    if not quiet:
        if already_there:
            click.echo("already there: these very statistics; nothing was done", err=True)
        click.echo(statistics_text(found), err=True)
    click.echo(out)


def _state(out: Path) -> tuple[int, int] | None:
    """What tells a new file from the one that was there."""
    if not out.is_file():
        return None
    status = out.stat()
    return status.st_ino, status.st_mtime_ns
