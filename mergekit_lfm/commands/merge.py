"""`merge` and `plan`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.options import (
    as_json,
    device_option,
    going_on_later,
    no_resume,
    overwrite,
    quiet,
    together,
)
from mergekit_lfm.commands.shell import Command, Size, show, transfers
from mergekit_lfm.machine.text import printable_line

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
    click.option(
        "--max-shard-size",
        type=Size(),
        help="Split the result into files of at most this size, such as 5GB. [default: the files of the base model]",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**64 - 1),
        help="The number from which random methods draw; the same one gives the same bytes. [default: the recipe's]",
    ),
)


@click.command(
    cls=Command,
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
@click.option("--dry-run", is_flag=True, help="Print the plan, and do nothing.")
@as_json
@quiet
@click.option("-v", "--verbose", is_flag=True, help="Also print the plan, with all tensors.")
@options.version
@click.pass_context
def merge(
    ctx: click.Context,
    recipe: Path,
    out: Path | None,
    memory: int | None,
    threads: int | None,
    max_shard_size: int | None,
    seed: int | None,
    push_to: str | None,
    private: bool,
    pull_back: bool,
    nan: Literal["error", "warn"],
    compile_: Literal["auto", "always", "never"],
    no_card: bool,
    device: str | None,
    overwrite: bool,
    no_resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Merge models as RECIPE says and write the result to OUT.

    Models are folders, or on the Hub: org/name, org/name@revision. RECIPE is a file, or - for standard input. OUT is a
    new folder; without it, the recipe's `output`, else merged/ and the recipe's name. A run that was interrupted goes
    on where it stopped when the same command is given again. Sizes are 500MB, 5GB (5e9 bytes), 3GiB, or a number of
    bytes.
    """
    from mergekit_lfm.api.merge import merge as run
    from mergekit_lfm.api.merge import plan_merge
    from mergekit_lfm.commands.show.terminal import Terminal

    hidden = quiet or as_json
    with transfers(hidden=hidden):
        how: dict[str, Any] = {"max_shard_size": max_shard_size, "seed": seed, "device": device, "push_to": push_to}
        planned = plan_merge(_read_recipe(recipe), out, private=private, card=not no_card, **how).result
        if planned.goal is None and (private or pull_back):
            raise click.UsageError("--private and --verify are about a push: give --push-to org/name")
        if dry_run or verbose:
            _show_plan(planned, memory, threads, as_json and dry_run, verbose, err=not dry_run)
        if dry_run:
            return
        with going_on_later(ctx, planned.out, planned.plan.digest):
            outcome = run(
                planned,
                memory=memory,
                threads=threads,
                nan=nan,
                overwrite=overwrite,
                resume=not no_resume,
                compile=compile_,
                verify_push=pull_back,
                progress=Terminal(hidden=hidden),
                on_merged=partial(_show_outcome, hidden=hidden),
            )
    _show_result(outcome, as_json, quiet)


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
    planned: PlannedMerge, memory: int | None, threads: int | None, as_json: bool, verbose: bool, *, err: bool = False
) -> None:
    from mergekit_lfm.commands.show.plans import plan_data, plan_text
    from mergekit_lfm.machine.resources import allocated_bytes, default_memory, free_space
    from mergekit_lfm.plan.budget import Budget, workers
    from mergekit_lfm.store.places import partial_of

    plan, out = planned.plan, planned.out
    memory = memory or default_memory()
    threads = workers(plan, memory, threads, planned.accelerator)
    free, needed = free_space(out), sum(shard.nbytes for shard in plan.shards) - allocated_bytes(partial_of(out))
    facts = {
        "out": str(out),
        "memory": memory,
        "threads": threads,
        "peak_memory": Budget(plan).peak(memory, threads),
        "free_disk": free,
        "enough_disk": needed <= free,
        "push": None if planned.goal is None else planned.goal.model_dump(),
        "device": planned.accelerator.name,
    }
    if as_json:
        click.echo(json.dumps(plan_data(plan) | facts), err=err)
    else:
        show(plan_text(plan, facts, verbose), err=err)


def _show_outcome(outcome: Outcome[Merged], *, hidden: bool) -> None:
    from mergekit_lfm.commands.show.plans import outcome_text

    for warning in outcome.warnings:
        show(f"warning: {printable_line(warning)}", err=True)
    if not hidden:
        show(outcome_text(outcome), err=True)


def _show_result(outcome: Outcome[Merged], as_json: bool, quiet: bool) -> None:
    from mergekit_lfm.commands.show.plans import push_data, push_text

    plan, pushed = outcome.result.plan, outcome.result.pushed
    if as_json:
        facts = {
            "out": str(outcome.path),
            "already_there": outcome.already_there,
            "tensors": len(plan.tensors),
            "bytes_written": plan.bytes_written,
            "resumed_bytes": outcome.result.resumed_bytes,
            "seconds": round(outcome.seconds, 3),
            "warnings": list(outcome.warnings),
            "digest": outcome.digest,
            "pushed": None if pushed is None else push_data(pushed),
        }
        click.echo(json.dumps(facts))
        return
    click.echo(outcome.path)
    if pushed is not None:
        if not quiet:
            show(push_text(pushed), err=True)
        click.echo(pushed.url)


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
def plan(
    recipe: Path,
    out: Path | None,
    memory: int | None,
    threads: int | None,
    max_shard_size: int | None,
    seed: int | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Print what a merge would read, write, drop and need, and do nothing.

    Only the headers of the models are read, on the Hub as well; with statistics the models are read once, to identify
    them by their content. The same as `merge --dry-run`.
    """
    from mergekit_lfm.api.merge import plan_merge

    with transfers(hidden=as_json):
        planned = plan_merge(_read_recipe(recipe), out, max_shard_size=max_shard_size, seed=seed, device="cpu").result
    _show_plan(planned, memory, threads, as_json, verbose)
