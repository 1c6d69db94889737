"""`plan`, and how a plan is shown."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.jobs import refuse_idle_options, show_of
from mergekit_lfm.commands.options import as_json, together
from mergekit_lfm.commands.shell import Command, OutFolder, lasting, transfers

if TYPE_CHECKING:
    from mergekit_lfm.api.planned import Planned, PlannedMerge
    from mergekit_lfm.recipe.source import RecipeText

# Options of `merge` and `plan`.
planning = together(
    click.argument("recipe", type=click.Path(path_type=Path)),
    click.argument("out", type=OutFolder(), required=False),
    options.memory,
    options.threads,
    options.max_shard_size,
    options.seed,
    options.heads,
    click.option(
        "--allow-unknown",
        is_flag=True,
        help="Go on if keys of the recipe are unknown, and name them; they have no effect.",
    ),
)


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm plan recipe.yaml
  mergekit-lfm plan recipe.yaml --json
  mergekit-lfm plan recipe.yaml --explain lm_head.weight --explain '*.layers.3.*'""",
)
@planning
@as_json
@click.option("-v", "--verbose", is_flag=True, help="Also list all tensors, with the values of their parameters.")
@click.option(
    "--explain",
    multiple=True,
    metavar="NAME",
    help="Print, in place of the plan, the sources of the output's tensors with this name, and the value of each "
    "parameter with its place in the recipe. * and ? in it match any characters; may be repeated.",
)
@click.pass_obj
def plan(
    console: Console,
    /,
    recipe: Path,
    out: Path | None,
    memory: int | None,
    threads: int | None,
    max_shard_size: int | None,
    seed: int | None,
    heads: Literal["base", "drop"] | None,
    allow_unknown: bool,
    verbose: bool,
    explain: tuple[str, ...],
) -> None:
    """Print what a merge would read, write, drop and need, and do nothing.

    Only the headers of the models are read, on the Hub as well; with statistics the models are read once, to identify
    them by their content. The same as `merge --dry-run`.
    """
    from mergekit_lfm.api.planned import PlannedMerge
    from mergekit_lfm.api.recipes import plan_recipe

    given = read_recipe(recipe)
    with transfers(hidden=console.hidden):
        how: dict[str, Any] = {"max_shard_size": max_shard_size, "seed": seed, "heads": heads}
        with lasting():
            how["allow_unknown"] = allow_unknown
            planned = plan_recipe(given, out, device="cpu", **how).result
    refuse_idle_options(planned)
    if explain and isinstance(planned, PlannedMerge):
        _show_explanations(console, planned, explain)
    show_plan(console, planned, memory, threads, verbose)


def _show_explanations(console: Console, planned: PlannedMerge, names: tuple[str, ...]) -> NoReturn:
    from mergekit_lfm.api.explain import explain_plan
    from mergekit_lfm.commands.show.explanations import explanations_data, explanations_text

    explanations = explain_plan(planned, names)
    console.conclude(explanations_data(explanations), lambda: explanations_text(explanations))


def read_recipe(path: Path) -> Path | RecipeText:
    """The path of a recipe; for "-" the text on standard input, as if its file were in the working directory."""
    if str(path) != "-":
        return path
    from mergekit_lfm.errors import PlanError
    from mergekit_lfm.recipe.source import RecipeText
    from mergekit_lfm.store.files import SMALL

    raw = sys.stdin.buffer.read(SMALL + 1)
    if len(raw) > SMALL:
        raise PlanError(f"standard input has over {SMALL:,} bytes, expected a recipe in YAML; give it one")
    try:
        return RecipeText(raw.decode(), Path.cwd(), "standard input")
    except UnicodeDecodeError:
        raise PlanError("standard input is not UTF-8 text, expected a recipe in YAML; give it one") from None


def show_plan(console: Console, planned: Planned, memory: int | None, threads: int | None, verbose: bool) -> NoReturn:
    """End with the plans of all stages as the result."""
    earlier = [{"stage": name, **_plan_data(stage, memory, threads)} for name, stage in _stages_of(planned)]
    data = _plan_data(planned, memory, threads) | ({"stages": earlier} if earlier else {})
    console.conclude(data, lambda: plan_texts(planned, memory, threads, verbose))


def _plan_data(planned: Planned, memory: int | None, threads: int | None) -> dict[str, Any]:
    """The plan of one stage for JSON."""
    from mergekit_lfm.api.planned import PlannedJob
    from mergekit_lfm.commands.show.plans import plan_data

    if isinstance(planned, PlannedJob):
        data: dict[str, Any] = show_of(planned.job).plan_data(planned.plan)
        return data
    return plan_data(planned.plan) | _machine_facts(planned, memory, threads)


def _stages_of(planned: Planned) -> list[tuple[str, Planned]]:
    """The names and plans of the stages before the last."""
    stages = planned.stages
    return [] if stages is None else [(s.name, plan) for s, plan in zip(stages.stages, stages.plans, strict=True)]


def plan_texts(planned: Planned, memory: int | None, threads: int | None, verbose: bool) -> str:
    """The plans of all stages."""
    texts = [f"stage {name}\n{_plan_text(stage, memory, threads, verbose)}\n" for name, stage in _stages_of(planned)]
    texts += ["the output"] if texts else []
    return "\n".join([*texts, _plan_text(planned, memory, threads, verbose)])


def _plan_text(planned: Planned, memory: int | None, threads: int | None, verbose: bool) -> str:
    """The plan of one stage."""
    from mergekit_lfm.api.planned import PlannedJob
    from mergekit_lfm.commands.show.plans import plan_text

    if isinstance(planned, PlannedJob):
        return str(show_of(planned.job).plan_text(planned.plan))
    return plan_text(planned.plan, _machine_facts(planned, memory, threads), verbose)


def _machine_facts(planned: PlannedMerge, memory: int | None, threads: int | None) -> dict[str, Any]:
    """The resources that the merge would take of this machine, and those that it has."""
    from mergekit_lfm.machine.resources import allocated_bytes, default_memory, free_space
    from mergekit_lfm.plan.budget import Budget, workers
    from mergekit_lfm.store.places import partial_of

    plan, out = planned.plan, planned.out
    memory = memory or default_memory()
    threads = workers(plan, memory, threads, planned.accelerator)
    free, needed = free_space(out), sum(shard.nbytes for shard in plan.shards) - allocated_bytes(partial_of(out))
    return {
        "out": str(out),
        "memory": memory,
        "threads": threads,
        "peak_memory": Budget(plan).peak(memory, threads),
        "free_disk": free,
        "enough_disk": needed <= free,
        "push": None if planned.goal is None else planned.goal.model_dump(),
        "device": planned.accelerator.name,
    }
