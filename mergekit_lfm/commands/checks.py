"""Options and the ending that the commands share that edit models or judge them by facts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import click

from mergekit_lfm.commands.console import ANSWER_IS_NO, Console
from mergekit_lfm.commands.options import device_option, together

if TYPE_CHECKING:
    from mergekit_lfm.api.edit import Edited
    from mergekit_lfm.api.patches import Applied

NOTHING_CHANGED = "nothing was taught: the edited model has the very weights of MODEL"

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


def conclude_edit(
    console: Console,
    data: dict[str, Any],
    text: Callable[[dict[str, Any]], str],
    result: Edited | Applied,
    min_efficacy: float | None,
    path: object,
) -> NoReturn:
    """End with the result of an edit, or of a patch that was applied, and the code for it.

    data: the result for JSON; its "warnings" are printed. text: shows it. path: is printed on standard output.
    """
    why = [] if result.changed else [NOTHING_CHANGED]
    if not result.good and result.after is not None:
        share = f"the edited model says {result.after.ea:.1%} of the facts"
        why.append(f"{share}; --min-efficacy asks for {min_efficacy:.1%}")
    console.warn(data["warnings"])
    facts = {**data, "min_efficacy": min_efficacy, "good": result.good, "changed": result.changed}
    console.conclude(facts, lambda: text(facts), path=path, code=ANSWER_IS_NO if why else 0, why=why)
