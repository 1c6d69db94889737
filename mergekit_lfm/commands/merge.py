"""`merge`."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.jobs import conclude_job, refuse_idle_options
from mergekit_lfm.commands.mergekit import DEFAULTS, OPTIONS, MergekitCommand, mergekit_notices, mergekit_options
from mergekit_lfm.commands.options import device_option, going_on_later, no_resume, overwrite
from mergekit_lfm.commands.plan import plan_texts, planning, read_recipe, show_plan
from mergekit_lfm.commands.shell import Partition, lasting, transfers

if TYPE_CHECKING:
    from mergekit_lfm.api.outcome import Outcome
    from mergekit_lfm.api.planned import Merged, Planned

# The options that are about the work, and that `run_recipe` takes as they are.
OF_WORK = ("nan", "trust_times", "engine", "ray_address", "stream_inputs", "drop_stages")


@click.command(
    cls=MergekitCommand,
    epilog="""\b
Examples:
  merge recipes/quickstart.yaml
  merge recipe.yaml out/my-model --memory 2GB --threads 4
  merge recipe.yaml --device cuda
  merge recipe.yaml --engine ray --ray-address head:6379
  merge recipe.yaml --partition 1/4
  merge recipe.yaml --dry-run
  merge recipe.yaml --push-to me/my-model --private --verify""",
)
@planning
@click.option(
    "--push-to",
    metavar="REPO",
    help="Push the result to this repository (org/name) on the Hub, or into a bucket (s3://bucket/path). [default: the "
    "recipe's]",
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
@click.option(
    "--engine",
    type=click.Choice(["threads", "ray"]),
    default="threads",
    help="Where the work is done: threads of this machine, or a Ray cluster whose nodes share its files. [default: "
    "threads]",
)
@click.option(
    "--ray-address",
    metavar="ADDR",
    help="The cluster: HOST:PORT, as `ray start --head` prints it, or local for one of this machine and this run.",
)
@click.option(
    "--partition",
    type=Partition(),
    metavar="I/N",
    help="Do part I of N, each a run of its own; the last to end completes OUT. 1/1 does all of it. [default: as "
    "torchrun or srun say to the processes that they start]",
)
@click.option(
    "--stream-inputs",
    is_flag=True,
    help="Read models on the Hub and in buckets by ranges, a part at a time, instead of downloading them first.",
)
@click.option("--drop-stages", is_flag=True, help="Remove the results of the recipe's earlier stages at the end.")
@click.option("--dry-run", is_flag=True, help="Print the plan, and do nothing.")
@options.output
@click.option("-v", "--verbose", is_flag=True, help="Also print the plan, with all tensors.")
@options.version
@mergekit_options(OPTIONS, DEFAULTS)
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
    compile_: Literal["auto", "always", "never"],
    no_card: bool,
    overwrite: bool,
    no_resume: bool,
    partition: tuple[int, int] | None,
    dry_run: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Merge models as RECIPE says and write the result to OUT.

    Models are folders, or on the Hub: org/name, org/name@revision, or in a bucket: s3://bucket/path (gs://, az://).
    RECIPE is a file, or - for standard input. OUT is a new folder, or an address in a bucket; by default the recipe's
    `output`, else merged/ and the recipe's name. A run that was interrupted goes on where it stopped when the same
    command is given again. A recipe of several documents is carried out stage by stage; their results stay in
    OUT.stages, where the next run takes those that have not changed. A stage with `job` makes an adapter: `adapters`
    merges several to one, `extract` takes one from a fine-tuned model. Sizes are 500MB, 5GB (5e9 bytes), 3GiB, or a
    number of bytes.
    """
    from mergekit_lfm.api.engines import check_engine, stream_models
    from mergekit_lfm.api.planned import PlannedJob
    from mergekit_lfm.api.recipes import plan_recipe, run_recipe
    from mergekit_lfm.commands.show.terminal import tell

    console.warn(mergekit_notices(click.get_current_context()))
    how = {name: options.pop(name) for name in OF_WORK}
    check_engine(how["engine"], how["ray_address"])
    with transfers(hidden=console.hidden):
        with lasting():
            planned = plan_recipe(read_recipe(recipe), out, private=private, card=not no_card, **options).result
        refuse_idle_options(planned)
        paths = planned.plan.request.paths.values() if isinstance(planned, PlannedJob) else planned.plan.paths
        console.keep_apart([planned.out, *paths])
        _need_push(planned, private=private, verify=pull_back)
        if how["stream_inputs"] and not isinstance(planned, PlannedJob):
            stream_models(planned.plan, memory, threads)
        if dry_run:
            show_plan(console, planned, memory, threads, verbose)
        if verbose:
            tell(plan_texts(planned, memory, threads, verbose=True))
        how |= {"memory": memory, "threads": threads, "overwrite": overwrite, "resume": not no_resume}
        how |= {"compile": compile_, "verify_push": pull_back, "progress": console.progress}
        how |= _part_of(console, planned, partition, threads, how["engine"])
        digest = None if isinstance(planned, PlannedJob) else planned.plan.digest
        with going_on_later(planned.out, digest):
            outcome = run_recipe(planned, on_merged=partial(_show_outcome, console), **how)
    if isinstance(planned, PlannedJob):
        conclude_job(console, planned.job, outcome)
    _conclude(console, outcome, staged=planned.staged)


def _need_push(planned: Planned, *, private: bool, verify: bool) -> None:
    from mergekit_lfm.api.planned import PlannedJob

    if not isinstance(planned, PlannedJob) and planned.goal is None and (private or verify):
        raise click.UsageError("--private and --verify are about a push: give --push-to org/name")


def _part_of(
    console: Console, planned: Planned, partition: tuple[int, int] | None, threads: int | None, engine: str
) -> dict[str, Any]:
    """The options for a part of the work, and the threads for it: as given, or as the launcher of this process says."""
    from mergekit_lfm.api.engines import find_started
    from mergekit_lfm.api.planned import PlannedJob
    from mergekit_lfm.machine.resources import default_threads

    if partition is not None:
        return {"part": None if partition == (1, 1) else partition}
    started = find_started(os.environ)
    if started is None or engine != "threads" or isinstance(planned, PlannedJob):
        return {}
    number, count = started.part
    console.progress.notice(f"part {number} of {count}, as {started.source} say; --partition 1/1 does all of it")
    return {"part": started.part, "threads": threads or max(1, default_threads() // started.beside)}


def _show_outcome(console: Console, outcome: Outcome[Merged]) -> None:
    from mergekit_lfm.commands.show.plans import outcome_text

    console.warn(outcome.warnings)
    console.say(outcome_text(outcome))


def _conclude(console: Console, outcome: Outcome[Merged], *, staged: bool) -> NoReturn:
    from mergekit_lfm.commands.show.plans import merge_data, push_text, waiting_text

    if outcome.result.waiting:
        console.conclude(merge_data(outcome), lambda: waiting_text(outcome))
    pushed = outcome.result.pushed
    data = merge_data(outcome) if console.wants_data else {}  # it takes long for many tensors
    if pushed is None:
        console.conclude(data, path=outcome.path)
    if staged:
        data |= {"out": pushed.url}
    console.conclude(data, lambda: push_text(pushed), path=pushed.url if staged else f"{outcome.path}\n{pushed.url}")
