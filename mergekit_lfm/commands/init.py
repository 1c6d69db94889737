"""`init`."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.options import as_json
from mergekit_lfm.commands.shell import Command, transfers


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm init recipes/quickstart/docs recipes/quickstart/code
  mergekit-lfm init Qwen/Qwen3-0.6B ./my-tune -o my-recipe.yaml
  mergekit-lfm init a b c -o -""",
)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default="recipe.yaml",
    help="The file to write, which must not exist; - for standard output. [default: recipe.yaml]",
)
@as_json
@click.pass_obj
def init(console: Console, /, models: tuple[str, ...], out: Path) -> None:
    """Write a commented recipe for models: folders, or on the Hub as org/name.

    The base is the model that the cards or configs of the others name. With a base the method is ties, or
    task_arithmetic for one model; without a base slerp for two models, and linear for more; for one model passthrough.
    The comments say why. Only headers, configs and cards are read.
    """
    from mergekit_lfm.api.init import init_recipe

    with transfers(hidden=console.hidden):
        outcome = init_recipe(models, None if str(out) == "-" else out)
    data = {"path": None if outcome.path is None else str(outcome.path), "recipe": outcome.result}
    text = outcome.result.rstrip()
    console.conclude(data, None if outcome.path else lambda: text, path=outcome.path)
