"""`merge`, `plan` and `verify`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.options import (
    as_json,
    going_on_later,
    needing_models,
    no_resume,
    overwrite,
    quiet,
    together,
)
from mergekit_lfm.commands.shell import ANSWER_IS_NO, Command, Size, transfers
from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.hub import HubName, hub_name

if TYPE_CHECKING:
    from mergekit_lfm.engine.execute import Outcome
    from mergekit_lfm.machine.accelerators import Accelerator
    from mergekit_lfm.output.push import Pushed
    from mergekit_lfm.plan.plan import Plan
    from mergekit_lfm.recipe.recipe import Push, Recipe

# What `merge` and `plan` take alike.
planning = together(
    click.argument("recipe", type=click.Path(path_type=Path)),
    click.argument("out", type=click.Path(path_type=Path), required=False),
    options.memory,
    options.threads,
    click.option("--max-shard-size", type=Size(), help="Size of an output file. [default: files as the base model's]"),
    click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="In place of the recipe's seed."),
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
@click.option("--push-to", metavar="REPO", help="Push the result to org/name on the Hub. [default: the recipe's push]")
@click.option("--private", is_flag=True, help="Make the repository private; one that is there has to be.")
@click.option("--verify", "pull_back", is_flag=True, help="Download what was pushed and compare it with its lock.")
@click.option(
    "--nan", type=click.Choice(["error", "warn"]), default="error", help="On NaN or infinity. [default: error]"
)
@click.option(
    "--compile",
    "compile_",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    help="Compile the arithmetic to machine code; auto where it saves time. The bytes are the same. [default: auto]",
)
@click.option("--device", help="Where to compute: cpu, cuda, cuda:1, auto. [default: the recipe's device, else cpu]")
@overwrite
@no_resume
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@as_json
@quiet
@click.option("-v", "--verbose", is_flag=True, help="Print the plan with all tensors, too.")
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
    device: str | None,
    overwrite: bool,
    no_resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Merge models as RECIPE says and write the result to OUT.

    Models are folders, or on the Hub: org/name, org/name@revision. OUT is a new folder; without it, the recipe's
    `output`, else merged/ and the recipe's name. A run that was interrupted goes on where it stopped when the same
    command is given again. Sizes are 500MB, 5GB (5e9 bytes), 3GiB, or a number of bytes.
    """
    from mergekit_lfm.api.merge import accelerator_of

    asked = _load(recipe, seed)
    gpu = accelerator_of(asked, device)
    plan, out = _make_plan(asked, recipe, out, max_shard_size, hidden=quiet or as_json)
    goal = _goal(plan, push_to, private, pull_back)
    if dry_run or verbose:
        _show_plan(plan, out, memory, threads, as_json and dry_run, verbose, err=not dry_run, goal=goal, gpu=gpu)
    if dry_run:
        return
    if goal is not None:
        from mergekit_lfm.output.push import check_repository

        check_repository(goal.repo, private=goal.private)
    from mergekit_lfm.commands.show.terminal import progress_bar
    from mergekit_lfm.engine.execute import execute

    notice = None if quiet or as_json else partial(click.echo, err=True)
    how: dict[str, Any] = {"memory": memory, "threads": threads, "nan": nan, "resume": not no_resume}
    how |= {"overwrite": overwrite, "notice": notice}
    on_the_hub = goal is not None or any(model.snapshot is not None for model in plan.models)
    with transfers(hidden=quiet or as_json) if on_the_hub else nullcontext():
        with going_on_later(ctx, out):
            if plan.unedited:
                plan = _edited(plan, out, gpu, max_shard_size=max_shard_size, **how)
            with progress_bar(plan.bytes_written, "merging", hidden=quiet or as_json) as progress:
                outcome = execute(plan, out, gpu=gpu, compile=compile_, progress=progress, **how)
        _show_outcome(plan, outcome, quiet or as_json)
        with going_on_later(ctx, out, written=True):
            pushed = None if goal is None else _push(out, goal, pull_back)
    _show_result(plan, outcome, pushed, as_json, quiet)


def _edited(plan: Plan, out: Path, gpu: Accelerator | None, **how: Any) -> Plan:
    with needing_models():
        from mergekit_lfm.edit.stages import solve_edits
        from mergekit_lfm.machine.accelerators import name_of

        return solve_edits(plan, out, device=name_of(gpu), **how)


def _goal(plan: Plan, push_to: str | None, private: bool, pull_back: bool) -> Push | None:
    """Where the result is pushed, if it is."""
    goal = plan.recipe.goal(push_to, private=private)
    if goal is None and (private or pull_back):
        raise click.UsageError("--private and --verify are about a push: give --push-to org/name")
    return goal


def _push(out: Path, goal: Push, pull_back: bool) -> Pushed:
    from mergekit_lfm.output.push import push

    return push(out, goal.repo, private=goal.private, pull_back=pull_back)


def _load(path: Path, seed: int | None) -> Recipe:
    from mergekit_lfm.recipe.recipe import Recipe

    recipe = Recipe.load(path)
    return recipe if seed is None else recipe.model_copy(update={"seed": seed})


def _make_plan(
    recipe: Recipe, source: Path, out: Path | None, max_shard_size: int | None, *, hidden: bool
) -> tuple[Plan, Path]:
    """The plan of the recipe in the file `source`, and where its output goes."""
    from mergekit_lfm.api.merge import default_output
    from mergekit_lfm.plan.plan import make_plan

    on_the_hub = any(isinstance(model.source, HubName) for model in recipe.all_models)
    with transfers(hidden=hidden) if on_the_hub else nullcontext():
        return make_plan(recipe, max_shard_size=max_shard_size), out or default_output(recipe, source)


def _show_plan(
    plan: Plan,
    out: Path,
    memory: int | None,
    threads: int | None,
    as_json: bool,
    verbose: bool,
    *,
    goal: Push | None,
    gpu: Accelerator | None = None,
    err: bool = False,
) -> None:
    from mergekit_lfm.commands.show.plans import plan_text
    from mergekit_lfm.machine.resources import default_memory, free_space, occupied
    from mergekit_lfm.plan.budget import workers
    from mergekit_lfm.store.places import partial_of

    memory = memory or default_memory()
    threads = workers(plan, memory, threads, gpu)
    free, needed = free_space(out), sum(shard.nbytes for shard in plan.shards) - occupied(partial_of(out))
    facts = {
        "out": str(out),
        "memory": memory,
        "threads": threads,
        "peak_memory": plan.peak_memory(memory, threads),
        "free_disk": free,
        "enough_disk": needed <= free,
        "push": None if goal is None else goal.model_dump(),
        "device": "cpu" if gpu is None else str(gpu.device),
    }
    click.echo(json.dumps(plan.summary() | facts) if as_json else plan_text(plan, facts, verbose), err=err)


def _show_outcome(plan: Plan, outcome: Outcome, quiet: bool) -> None:
    from mergekit_lfm.commands.show.plans import outcome_text

    for warning in outcome.warnings:
        click.echo(f"warning: {warning}", err=True)
    if not quiet:
        click.echo(outcome_text(plan, outcome), err=True)


def _show_result(plan: Plan, outcome: Outcome, pushed: Pushed | None, as_json: bool, quiet: bool) -> None:
    from mergekit_lfm.commands.show.plans import pushed_data, pushed_text

    if as_json:
        facts = {
            "out": str(outcome.path),
            "already_there": outcome.already_there,
            "tensors": len(plan.tensors),
            "bytes_written": plan.bytes_written,
            "resumed_bytes": outcome.resumed_bytes,
            "seconds": round(outcome.seconds, 3),
            "warnings": list(outcome.warnings),
            "digest": plan.digest,
            "pushed": None if pushed is None else pushed_data(pushed),
        }
        click.echo(json.dumps(facts))
        return
    click.echo(outcome.path)
    if pushed is not None:
        if not quiet:
            click.echo(pushed_text(pushed), err=True)
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
@click.option("-v", "--verbose", is_flag=True, help="List all tensors.")
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
    """Say what a merge would read, write, drop and need, and do nothing.

    Of the models only the headers are read, on the Hub as well; with statistics the models are read once, to know them
    by their content.
    The same as `merge --dry-run`.
    """
    planned, out = _make_plan(_load(recipe, seed), recipe, out, max_shard_size, hidden=as_json)
    _show_plan(planned, out, memory, threads, as_json, verbose, goal=planned.recipe.push)


@click.command(
    cls=Command,
    epilog="""\b
Example:
  mergekit-lfm verify merged/quickstart
  mergekit-lfm verify me/my-merge@main""",
)
@click.argument("out")
@as_json
@quiet
@click.pass_context
def verify(ctx: click.Context, out: str, as_json: bool, quiet: bool) -> None:
    """Read a merged model again and compare it with its merge.lock.json.

    OUT is its folder, or its name on the Hub, from where what the lock names is downloaded to the cache. Prints every
    difference; the exit code is 1 if there is one.
    """
    from mergekit_lfm.commands.show.terminal import counted, progress_bar
    from mergekit_lfm.output.card import CARD, KEPT
    from mergekit_lfm.output.lock import LOCK, covered
    from mergekit_lfm.output.lock import verify as differences

    hidden = quiet or as_json
    folder = Path(out)
    if not folder.exists() and (name := hub_name(out)) is not None:
        from mergekit_lfm.store.hub.snapshots import find_snapshot

        with transfers(hidden=hidden):
            snapshot = find_snapshot(name)
            if LOCK not in snapshot.sizes:
                raise FormatError(f"{snapshot} has no {LOCK}: it is no output of `merge`")
            snapshot.fetch([LOCK])
            snapshot.fetch([file for file in covered(snapshot.folder) if file in snapshot.sizes])
        folder = snapshot.folder
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with progress_bar(nbytes, "verifying", hidden=hidden) as progress:
        problems = differences(folder, progress)
    if folder != Path(out) and KEPT in snapshot.sizes:  # beside a card that was edited there
        problems = [line for line in problems if not line.startswith(f"{CARD} ")]
    if as_json:
        click.echo(json.dumps({"out": out, "good": not problems, "problems": problems}))
    else:
        verdict = f"{counted(len(problems), 'difference')} to its lock" if problems else "good, all as its lock says"
        click.echo("\n".join([*problems, f"{out}: {verdict}"]))
    ctx.exit(ANSWER_IS_NO if problems else 0)
