"""`merge` and `plan` of a recipe with `job: adapters`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click
from click.core import ParameterSource

from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.shell import lasting, transfers

if TYPE_CHECKING:
    from mergekit_lfm.recipe.source import RecipeText

# The options of `merge` that such a recipe takes, and those of its console.
TAKEN = {
    "recipe",
    "out",
    "seed",
    "allow_unknown",
    "overwrite",
    "dry_run",
    "verbose",
    "as_json",
    "quiet",
    "log",
    "report",
}


def merge_adapters(
    console: Console, recipe: Path | RecipeText, out: Path | None, *, overwrite: bool, dry_run: bool
) -> NoReturn:
    """Merge adapters as a recipe says, or print what would be made."""
    from mergekit_lfm.api.adapter_plans import plan_adapters
    from mergekit_lfm.api.adapters import merge_adapter_recipe
    from mergekit_lfm.commands.show import adapters as show
    from mergekit_lfm.commands.show.outcomes import outcome_data

    ctx = click.get_current_context()
    _refuse_others(ctx)
    with transfers(hidden=console.hidden), lasting():
        seed, allow_unknown = ctx.params["seed"], ctx.params["allow_unknown"]
        planned = plan_adapters(recipe, out, seed=seed, allow_unknown=allow_unknown).result
        console.keep_apart([planned.out, *(adapter.tensors.path for adapter in planned.adapters)])
        if dry_run:
            console.conclude(show.plan_data(planned), lambda: show.plan_text(planned))
        outcome = merge_adapter_recipe(planned, overwrite=overwrite, progress=console.progress)
    console.warn(outcome.warnings)
    data = outcome_data(outcome) | show.merged_data(outcome.result)
    console.conclude(data, lambda: show.merged_text(outcome), path=outcome.path)


def _refuse_others(ctx: click.Context) -> None:
    """Raise UsageError for options that are about merges of models."""
    given = [
        parameter.opts[0]
        for parameter in ctx.command.params
        if parameter.name is not None
        and parameter.name not in TAKEN
        and ctx.get_parameter_source(parameter.name) == ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(f"the recipe merges adapters, for which there is no {', '.join(given)}; leave it out")
