"""`distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.options import going_on_later
from mergekit_lfm.commands.parameters import method_option, parameter_options
from mergekit_lfm.commands.shell import Command
from mergekit_lfm.commands.training import data_options, loss_option, training_options
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.launch import rank
from mergekit_lfm.recipe.distill_terms import DISTILL_TERMS, KEPT, KdDivergence
from mergekit_lfm.recipe.registry import TUNE_METHODS


def _rows() -> str:
    return "\n".join(f"  {term.name:9} {term.summary}" for term in DISTILL_TERMS.values())


HELP = f"""Train STUDENT to follow one or more teachers on data, and write it as `tune` does.

\b
Terms of --loss, each with a weight, as --loss kd=0.9 --loss task=0.1:
{_rows()}

By default kd, for encoders embed, for numbers logits. Data are as for `tune`; labels and positives are needed for task
and local, and in --dev, alone. hint, vid, attention and lit compare layers, evenly, or those of --layer.

A teacher is a folder, a name on the Hub, or MODEL+ADAPTER. The teachers are asked before the training, one after the
other, and what they say is kept in OUT.training until it ends, or in the folder of --cache for other runs too; --top-k
makes that smaller. With --no-cache they stay in memory and are asked in each step, to the same bytes. With --dev FILE
the result says how teachers and student do on it, and what share of the student's lack came back.

A teacher of a language model must have the student's tokenizer, unless the loss is uld, alone or with task.

A run that was interrupted goes on when the same command runs again. Recipes give each teacher a weight, or classes of
its own. Needs the extra: pip install "mergekit_lfm[models]"
"""


def _read_layers(
    ctx: click.Context,  # noqa: ARG001
    parameter: click.Parameter,  # noqa: ARG001
    texts: tuple[str, ...],
) -> dict[int, int] | None:
    try:
        pairs = [(int(mine), int(theirs)) for mine, theirs in (text.split("=") for text in texts)]
        if len(dict(pairs)) < len(pairs):
            raise click.BadParameter("found a layer of the student twice; expected each once")
        return dict(pairs) or None
    except ValueError:
        raise click.BadParameter(f"found {' '.join(texts)!r}; expected two numbers each, as 1=2") from None


@click.command(
    cls=Command,
    help=HELP,
    epilog="""\b
Examples:
  mergekit-lfm distill student --teacher models/base --data a.jsonl --task lm -o distilled
  mergekit-lfm distill merged --teacher a --teacher b --data a.jsonl --dev b.jsonl --task lm -o healed
  mergekit-lfm distill small --teacher large --data a.jsonl --task embedding --loss embed=1 --loss hint=0.1 -o out""",
)
@click.argument("student")
@click.option(
    "--teacher", "teachers", required=True, multiple=True, help="A model to follow. Can be given several times."
)
@data_options
@loss_option([*DISTILL_TERMS, *KEPT], "The weight of a term")
@click.option("--temperature", type=click.FloatRange(0, min_open=True), help="Of kd, uld and local. [default: 2]")
@click.option(
    "--divergence",
    type=click.Choice(get_args(KdDivergence)),
    help="For kd: forward is KL(teacher, student), reverse the other way, js of both to their mean. [default: forward]",
)
@click.option(
    "--top-k", type=click.IntRange(min=1), help="Read so many of a teacher's largest scores, and the share of the rest."
)
@click.option(
    "--layer",
    "layers",
    multiple=True,
    callback=_read_layers,
    metavar="S=T",
    help="The student's hidden state S follows the teacher's T, 0 for the embeddings. Can be given several times.",
)
@click.option("--cache", type=click.Path(path_type=Path), help="A folder to keep what the teachers say for other runs.")
@click.option("--no-cache", is_flag=True, help="Keep the teachers in memory, and ask them in each step.")
@method_option(TUNE_METHODS, "full", "The part of the student that is trained, and how.")
@parameter_options(TUNE_METHODS)
@training_options
@click.pass_obj
def distill(
    console: Console,
    /,
    student: str,
    teachers: tuple[str, ...],
    data: tuple[Path, ...],
    out: Path,
    cache: Path | None,
    no_cache: bool,
    **values: Any,
) -> None:
    """Train a student; the text is HELP."""
    from mergekit_lfm.api.distill import distill_model
    from mergekit_lfm.commands.show.distillations import done_data, done_text

    if cache is not None and no_cache:
        raise PlanError("found --cache and --no-cache; expected one of them. Leave one out")
    own = {parameter.name for each in TUNE_METHODS.values() for parameter in each.parameters}
    parameters = {name: values.pop(name) for name in own}
    values["parameters"] = {name: value for name, value in parameters.items() if value is not None}
    values["train"] = values["train"] or None
    values["loss"] = values["loss"] or None
    with going_on_later(out):
        kept: Path | bool | None = False if no_cache else cache
        outcome = distill_model(student, teachers, data, out, cache=kept, progress=console.progress, **values)
    if rank():
        return  # the first of several processes prints
    console.warn(outcome.warnings)
    console.conclude(done_data(outcome), lambda: done_text(outcome), path=out)
