"""What commands share that edit models: how these run, and whether the edits hold once they are read from files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_lfm.commands.options import needing_models, together
from mergekit_lfm.commands.shell import ANSWER_IS_NO
from mergekit_lfm.errors import PlanError

if TYPE_CHECKING:
    from mergekit_lfm.artifacts.facts import FactsFile
    from mergekit_lfm.edit.scores import FactScores
    from mergekit_lfm.runtime.load import Loaded
    from mergekit_lfm.store.checkpoint import Checkpoint

# How models run that are edited, traced or judged.
running = together(
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float64", "bfloat16", "float16", "auto"]),
        default="float32",
        help="What the model computes in; auto as it is saved. [default: float32]",
    ),
    click.option("--device", default="cpu", help="Where the model runs: cpu, cuda, cuda:1, auto. [default: cpu]"),
)

# What is asked of the edited model.
verifying = together(
    click.option(
        "--min-efficacy",
        type=click.FloatRange(0, 1),
        help="Exit with 1 where a smaller share of the facts is what the edited model says (EA).",
    ),
    click.option("--no-verify", is_flag=True, help="Do not judge the edited model."),
)


def check_verifying(min_efficacy: float | None, no_verify: bool) -> None:
    """A usage error for a bar that nothing is measured against."""
    if no_verify and min_efficacy is not None:
        raise click.UsageError("--min-efficacy is found by judging the edited model; leave out --no-verify.")


def check_new_folder(out: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """PlanError where an edited model must not be written to a folder, before the work."""
    from mergekit_lfm.api.patches import undo_file
    from mergekit_lfm.store.places import check_file

    if out.exists() and not overwrite:
        raise PlanError(f"{out} exists; choose another output, or use --overwrite")
    place = out.resolve()
    if any(place.is_relative_to(path) or path.is_relative_to(place) for path in (given.resolve() for given in inputs)):
        raise PlanError(f"the output {out} and an input lie in one another; choose another output")
    check_file(undo_file(out), inputs, overwrite=overwrite)


def load(model: Path | Checkpoint, dtype: str, device: str) -> Loaded:
    """The language model in a folder, or as a view of its files has it. PlanError without transformers or tokenizer."""
    from mergekit_lfm.runtime.load import load_model, tokenizer_for_texts

    with needing_models():
        loaded = load_model(model, "lm", dtype=dtype, device=device)
    tokenizer_for_texts(loaded.tokenizer)
    return loaded


def score(loaded: Loaded, facts: FactsFile, doing: str, hidden: bool) -> FactScores:
    """What the model says of the facts. doing: what the bar on the terminal calls it."""
    from mergekit_lfm.commands.show.terminal import counter
    from mergekit_lfm.edit.scores import score_facts

    with counter(" prompts", doing, hidden=hidden) as progress:
        return score_facts(loaded.model, loaded.tokenizer, facts, progress=progress)


def low_efficacy(scores: Mapping[str, Any] | None, min_efficacy: float | None) -> str | None:
    """What is said where the share of facts that the edited model says is below the bar; None where it is not."""
    if scores is None or min_efficacy is None or scores["ea"] >= min_efficacy:
        return None
    return f"the edited model says {scores['ea']:.1%} of the facts; --min-efficacy asks for {min_efficacy:.1%}"


def conclude(
    ctx: click.Context,
    found: dict[str, Any],
    text: Callable[[dict[str, Any]], str],
    where: object,
    min_efficacy: float | None,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Print what was done and found, as it was asked for, and end with the code for it.

    found: its "after" are the scores of the edited model or None, its "warnings" are printed. text: shows it. where:
    what is left on standard output.
    """
    low = low_efficacy(found["after"], min_efficacy)
    found |= {"min_efficacy": min_efficacy, "good": low is None}
    if as_json:
        click.echo(json.dumps(found))
    else:
        if not quiet:
            click.echo(text(found), err=True)
        for line in [*(f"warning: {warning}" for warning in found.get("warnings", ())), *([low] if low else [])]:
            click.echo(line, err=True)
        click.echo(where)
    ctx.exit(ANSWER_IS_NO if low else 0)
