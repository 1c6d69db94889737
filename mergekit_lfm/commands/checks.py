"""Options and endings that the commands share that edit models or judge them by facts."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mergekit_lfm.commands.options import device_option, together
from mergekit_lfm.commands.shell import ANSWER_IS_NO, show
from mergekit_lfm.machine.text import printable_line

if TYPE_CHECKING:
    from mergekit_lfm.edit.scores import FactScores

# How models run that are edited, traced or judged.
running = together(
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float64", "bfloat16", "float16", "auto"]),
        default="float32",
        help="The number format that the model computes in; auto is the one it is saved in. [default: float32]",
    ),
    device_option("Where the model runs"),
)

# How an edited model is verified.
verifying = together(
    click.option(
        "--min-efficacy",
        type=click.FloatRange(0, 1),
        help="Exit with code 1 if the edited model says a smaller share of the facts than this, from 0 to 1 (EA).",
    ),
    click.option("--no-verify", is_flag=True, help="Do not load the edited model to score it on the facts."),
)


def check_verifying(min_efficacy: float | None, no_verify: bool) -> None:
    """Raise a usage error for a smallest share that nothing is compared with."""
    if no_verify and min_efficacy is not None:
        raise click.UsageError("--min-efficacy is found by judging the edited model; leave out --no-verify.")


def conclude(
    ctx: click.Context,
    data: dict[str, Any],
    text: Callable[[dict[str, Any]], str],
    scores: FactScores | None,
    min_efficacy: float | None,
    good: bool,
    *,
    where: object,
    as_json: bool,
    quiet: bool,
) -> None:
    """Print the result in the wanted form, and end with the code for it.

    data: the result for JSON; its "warnings" are printed. text: shows it. scores: of the edited model. where: the path
    that is printed on standard output.
    """
    if as_json:
        click.echo(json.dumps({**data, "min_efficacy": min_efficacy, "good": good}))
    else:
        if not quiet:
            show(text(data), err=True)
        for warning in data.get("warnings", ()):
            show(f"warning: {printable_line(warning)}", err=True)
        if not good and scores is not None:
            share = f"the edited model says {scores.ea:.1%} of the facts"
            show(f"{share}; --min-efficacy asks for {min_efficacy:.1%}", err=True)
        click.echo(where)
    ctx.exit(0 if good else ANSWER_IS_NO)
