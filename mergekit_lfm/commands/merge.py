"""`merge` and `plan`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.mergekit import MergekitCommand, mergekit_notices, mergekit_options
from mergekit_lfm.commands.options import as_json, device_option, going_on_later, no_resume, overwrite, together
from mergekit_lfm.commands.shell import Command, transfers

if TYPE_CHECKING:
    from mergekit_lfm.api.merge import Merged, PlannedMerge
    from mergekit_lfm.api.outcome import Outcome
    from mergekit_lfm.recipe.recipe import Recipe

# Options of both.
planning = together(
    click.argument("recipe", type=click.Path(path_type=Path)),
    click.argument("out", type=click.Path(path_type=Path), required=False),
    options.memory,
    options.threads,
    options.max_shard_size,
    options.seed,
)


@click.command(
    cls=MergekitCommand,
    epilog="""\b
Examples:
  merge recipes/quickstart.yaml
  merge recipe.yaml out/my-model --memory 2GB --threads 4
  merge recipe.yaml --device cuda
  merge recipe.yaml --dry-run
  merge recipe.yaml --push-to me/my-model --private --verify""",
)
@planning
@click.option(
    "--push-to",
    metavar="REPO",
    help="Push the result to this repository (org/name) on the Hub. [default: the recipe's]",
)
@click.option("--private", is_flag=True, help="Make the repository private; refuse one that exists and is public.")
@click.option(
    "--verify", "pull_back", is_flag=True, help="Download the pushed model again, and compare it with its lock."
)
@click.option(
    "--nan",
    type=click.Choice(["error", "warn"]),
    default="error",
    help="If a tensor holds NaN or infinity, error stops the merge, warn goes on and names it. [default: error]",
)
@click.option(
    "--compile",
    "compile_",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    help="Compile the arithmetic to machine code; auto does if it saves time. The bytes are the same. [default: auto]",
)
@click.option("--no-card", is_flag=True, help="Write no model card (README.md).")
@device_option("Where to compute", default=None, otherwise="the recipe's, else cpu")
@overwrite
@no_resume
@click.option(
    "--trust-times",
    is_flag=True,
    help="Tell a change of an input by its size and modification time alone, where inodes or other times change.",
)
@click.option("--drop-stages", is_flag=True, help="Remove the results of the recipe's earlier stages at the end.")
@click.option("--dry-run", is_flag=True, help="Print the plan, and do nothing.")
@options.output
@click.option("-v", "--verbose", is_flag=True, help="Also print the plan, with all tensors.")
@options.version
@mergekit_options
@click.pass_obj
def merge(
    console: Console,
    /,
    recipe: Path,
    out: Path | None,
    memory: int | None,
    threads: int | None,
    private: bool,
    pull_back: bool,
    nan: Literal["error", "warn"],
    compile_: Literal["auto", "always", "never"],
    no_card: bool,
    overwrite: bool,
    no_resume: bool,
    trust_times: bool,
    drop_stages: bool,
    dry_run: bool,
    verbose: bool,
    **where: Any,
) -> None:
    """Merge models as RECIPE says and write the result to OUT.

    Models are folders, or on the Hub: org/name, org/name@revision. RECIPE is a file, or - for standard input. OUT is a
    new folder; without it, the recipe's `output`, else merged/ and the recipe's name. A run that was interrupted goes
    on where it stopped when the same command is given again. A recipe of several documents is carried out stage by
    stage; their results stay in OUT.stages, where the next run takes those that have not changed. Sizes are 500MB, 5GB
    (5e9 bytes), 3GiB, or a number of bytes.
    """
    from mergekit_lfm.api.merge import merge as run
    from mergekit_lfm.api.merge import plan_merge
    from mergekit_lfm.commands.show.terminal import tell

    console.warn(mergekit_notices(click.get_current_context()))
    with transfers(hidden=console.hidden):
        planned = plan_merge(_read_recipe(recipe), out, private=private, card=not no_card, **where).result
        console.keep_apart([planned.out, *planned.plan.paths])
        if planned.goal is None and (private or pull_back):
            raise click.UsageError("--private and --verify are about a push: give --push-to org/name")
        if dry_run:
            _show_plan(console, planned, memory, threads, verbose)
        if verbose:
            tell(_plan_texts(planned, memory, threads, verbose=True))
        with going_on_later(planned.out, planned.plan.digest):
            outcome = run(
                planned,
                memory=memory,
                threads=threads,
                nan=nan,
                overwrite=overwrite,
                resume=not no_resume,
                trust_times=trust_times,
                drop_stages=drop_stages,
                compile=compile_,
                verify_push=pull_back,
                progress=console.progress,
                on_merged=partial(_show_outcome, console),
            )
    _conclude(console, outcome)


def _show_outcome(console: Console, outcome: Outcome[Merged]) -> None:
    from mergekit_lfm.commands.show.plans import outcome_text

    console.warn(outcome.warnings)
    console.say(outcome_text(outcome))


def _conclude(console: Console, outcome: Outcome[Merged]) -> NoReturn:
    from mergekit_lfm.commands.show.plans import merge_data, push_text

    pushed = outcome.result.pushed
    if pushed is None:
        console.conclude(merge_data(outcome), path=outcome.path)
    console.conclude(merge_data(outcome), lambda: push_text(pushed), path=f"{outcome.path}\n{pushed.url}")


def _read_recipe(path: Path) -> Path | Recipe:
    """The path of a recipe; for "-" the recipe on standard input, as if its file were in the working directory."""
    if str(path) != "-":
        return path
    from mergekit_lfm.errors import PlanError
    from mergekit_lfm.recipe.recipe import Recipe
    from mergekit_lfm.store.files import SMALL

    raw = sys.stdin.buffer.read(SMALL + 1)
    if len(raw) > SMALL:
        raise PlanError(f"standard input has over {SMALL:,} bytes, expected a recipe in YAML; give it one")
    try:
        return Recipe.parse(raw.decode(), where=Path.cwd(), label="standard input")
    except UnicodeDecodeError:
        raise PlanError("standard input is not UTF-8 text, expected a recipe in YAML; give it one") from None


def _show_plan(
    console: Console, planned: PlannedMerge, memory: int | None, threads: int | None, verbose: bool
) -> NoReturn:
    from mergekit_lfm.commands.show.plans import plan_data

    facts = _machine_facts(planned, memory, threads)
    earlier = [
        {"stage": name, **plan_data(stage.plan), **_machine_facts(stage, memory, threads)}
        for name, stage in _stages_of(planned)
    ]
    data = plan_data(planned.plan) | facts | ({"stages": earlier} if earlier else {})
    console.conclude(data, lambda: _plan_texts(planned, memory, threads, verbose))


def _stages_of(planned: PlannedMerge) -> list[tuple[str, PlannedMerge]]:
    """The names and plans of the stages before the last."""
    stages = planned.stages
    return [] if stages is None else [(s.name, plan) for s, plan in zip(stages.stages, stages.plans, strict=True)]


def _plan_texts(planned: PlannedMerge, memory: int | None, threads: int | None, verbose: bool) -> str:
    """The plans of all stages."""
    from mergekit_lfm.commands.show.plans import plan_text

    texts = [
        f"stage {name}\n{plan_text(stage.plan, _machine_facts(stage, memory, threads), verbose)}\n"
        for name, stage in _stages_of(planned)
    ]
    texts += ["the output"] if texts else []
    return "\n".join([*texts, plan_text(planned.plan, _machine_facts(planned, memory, threads), verbose)])


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


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm plan recipe.yaml
  mergekit-lfm plan recipe.yaml --json""",
)
@planning
@as_json
@click.option("-v", "--verbose", is_flag=True, help="Also list all tensors.")
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
    verbose: bool,
) -> None:
    """Print what a merge would read, write, drop and need, and do nothing.

    Only the headers of the models are read, on the Hub as well; with statistics the models are read once, to identify
    them by their content. The same as `merge --dry-run`.
    """
    from mergekit_lfm.api.merge import plan_merge

    with transfers(hidden=console.hidden):
        planned = plan_merge(_read_recipe(recipe), out, max_shard_size=max_shard_size, seed=seed, device="cpu").result
    _show_plan(console, planned, memory, threads, verbose)
