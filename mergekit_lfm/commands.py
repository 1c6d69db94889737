"""The command line: `merge`, the main job, and `mergekit-lfm`, every command.

Standard output carries the result, and with --json exactly one JSON object; everything else goes to standard error.
What a command needs is imported when it runs, so that --help is quick.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from mergekit_lfm import __version__
from mergekit_lfm.console import ANSWER_IS_NO, INTERRUPTED, Command, Size
from mergekit_lfm.errors import PlanError

if TYPE_CHECKING:
    from mergekit_lfm.evaluate import Perplexity
    from mergekit_lfm.execute import Outcome
    from mergekit_lfm.plan import Plan

F = TypeVar("F", bound=Callable[..., Any])

as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
quiet = click.option("-q", "--quiet", is_flag=True, help="Print the result, warnings and errors only.")


def _planning(command: F) -> F:
    """What `merge` and `plan` take alike."""
    for decorate in (
        click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="In place of the recipe's seed."),
        click.option(
            "--max-shard-size", type=Size(), help="Size of an output file. [default: files as the base model's]"
        ),
        click.option("--threads", type=click.IntRange(min=1), help="[default: the number of cores]"),
        click.option(
            "--memory", type=Size(), help="Most to hold at a time. [default: a quarter of the RAM, at most 4GB]"
        ),
        click.argument("out", type=click.Path(path_type=Path), required=False),
        click.argument("recipe", type=click.Path(path_type=Path)),
    ):
        command = decorate(command)
    return command


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  merge recipes/quickstart.yaml
  merge recipe.yaml out/my-model --memory 2GB --threads 4
  merge recipe.yaml --dry-run""",
)
@_planning
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
@click.option("--overwrite", is_flag=True, help="Replace OUT where it exists.")
@click.option("--no-resume", is_flag=True, help="Start over instead of going on with an interrupted run.")
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
    nan: Literal["error", "warn"],
    compile_: Literal["auto", "always", "never"],
    overwrite: bool,
    no_resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Merge models as RECIPE says and write the result to OUT.

    OUT is a new folder; without it, the recipe's `output`, else merged/ and the recipe's name. A run that was
    interrupted goes on where it stopped when the same command is given again. Sizes are 500MB, 5GB (5e9 bytes), 3GiB,
    or a number of bytes.
    """
    plan, out = _make_plan(recipe, out, seed, max_shard_size)
    if dry_run or verbose:
        _show_plan(plan, out, memory, threads, as_json and dry_run, verbose, err=not dry_run)
    if dry_run:
        return
    from mergekit_lfm.display import progress_bar
    from mergekit_lfm.execute import execute

    try:
        with progress_bar(plan.bytes_written, "merging", hidden=quiet or as_json) as progress:
            outcome = execute(
                plan,
                out,
                memory=memory,
                threads=threads,
                nan=nan,
                resume=not no_resume,
                overwrite=overwrite,
                compile=compile_,
                progress=progress,
            )
    except KeyboardInterrupt:
        from mergekit_lfm.durable import partial_of

        kept = partial_of(out)
        done = f"what is done is kept in {kept}" if kept.exists() else "nothing was written"
        click.echo(f"interrupted: {done}; run the same command again to go on", err=True)
        ctx.exit(INTERRUPTED)
    _show_outcome(plan, outcome, as_json, quiet)


def _make_plan(recipe_path: Path, out: Path | None, seed: int | None, max_shard_size: int | None) -> tuple[Plan, Path]:
    """The plan of the recipe, and where its output goes."""
    from mergekit_lfm.api import default_output
    from mergekit_lfm.plan import make_plan
    from mergekit_lfm.recipe import Recipe

    recipe = Recipe.load(recipe_path)
    if seed is not None:
        recipe = recipe.model_copy(update={"seed": seed})
    return make_plan(recipe, max_shard_size=max_shard_size), out or default_output(recipe, recipe_path)


def _show_plan(
    plan: Plan, out: Path, memory: int | None, threads: int | None, as_json: bool, verbose: bool, err: bool = False
) -> None:
    from mergekit_lfm.display import plan_text
    from mergekit_lfm.durable import partial_of
    from mergekit_lfm.machine import default_memory, default_threads, free_space, occupied

    memory = memory or default_memory()
    threads = threads or min(default_threads(), plan.most_threads(memory))
    free, needed = free_space(out), sum(shard.nbytes for shard in plan.shards) - occupied(partial_of(out))
    facts = {
        "out": str(out),
        "memory": memory,
        "threads": threads,
        "peak_memory": plan.peak_memory(memory, threads),
        "free_disk": free,
        "enough_disk": needed <= free,
    }
    click.echo(json.dumps(plan.summary() | facts) if as_json else plan_text(plan, facts, verbose), err=err)


def _show_outcome(plan: Plan, outcome: Outcome, as_json: bool, quiet: bool) -> None:
    from mergekit_lfm.display import outcome_text

    for warning in outcome.warnings:
        click.echo(f"warning: {warning}", err=True)
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
        }
        click.echo(json.dumps(facts))
        return
    if not quiet:
        click.echo(outcome_text(plan, outcome), err=True)
    click.echo(outcome.path)


@click.group(
    epilog="""\b
Examples:
  mergekit-lfm merge recipe.yaml out/my-model
  mergekit-lfm methods ties
  mergekit-lfm verify out/my-model"""
)
@click.version_option(__version__, prog_name="mergekit-lfm")
def main() -> None:
    """Merge saved models: checkpoints in, a checkpoint out."""


main.add_command(merge)


@main.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm plan recipe.yaml
  mergekit-lfm plan recipe.yaml --json""",
)
@_planning
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

    Of the models only the headers are read. The same as `merge --dry-run`.
    """
    planned, out = _make_plan(recipe, out, seed, max_shard_size)
    _show_plan(planned, out, memory, threads, as_json, verbose)


@main.command(
    cls=Command,
    epilog="""\b
Example:
  mergekit-lfm verify merged/quickstart""",
)
@click.argument("out", type=click.Path(path_type=Path))
@as_json
@quiet
@click.pass_context
def verify(ctx: click.Context, out: Path, as_json: bool, quiet: bool) -> None:
    """Read a merged model again and compare it with its merge.lock.json.

    Prints every difference; the exit code is 1 if there is one.
    """
    from mergekit_lfm.display import counted, progress_bar
    from mergekit_lfm.provenance import verify as differences

    nbytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    with progress_bar(nbytes, "verifying", hidden=quiet or as_json) as progress:
        problems = differences(out, progress)
    if as_json:
        click.echo(json.dumps({"out": str(out), "good": not problems, "problems": problems}))
    else:
        verdict = f"{counted(len(problems), 'difference')} to its lock" if problems else "good, all as its lock says"
        click.echo("\n".join([*problems, f"{out}: {verdict}"]))
    ctx.exit(ANSWER_IS_NO if problems else 0)


@main.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm inspect merged/quickstart
  mergekit-lfm inspect model-00001-of-00002.safetensors --json""",
)
@click.argument("path", type=click.Path(path_type=Path))
@as_json
def inspect(path: Path, as_json: bool) -> None:
    """List the tensors of a model's folder or of one file: shapes, dtypes, sizes, totals."""
    from mergekit_lfm.checkpoint import open_checkpoint
    from mergekit_lfm.display import checkpoint_data, checkpoint_text

    data = checkpoint_data(open_checkpoint(path))
    click.echo(json.dumps(data) if as_json else checkpoint_text(data))


@main.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm methods
  mergekit-lfm methods ties""",
)
@click.argument("name", required=False)
@as_json
def methods(name: str | None, as_json: bool) -> None:
    """List the merge methods, or say all about one: parameters, defaults, source."""
    from mergekit_lfm.display import method_data, method_text, table
    from mergekit_lfm.methods import METHODS
    from mergekit_lfm.settings import did_you_mean

    if name is not None and name not in METHODS:
        raise PlanError(f"there is no method {name!r}, {did_you_mean(name, METHODS)}")
    chosen = list(METHODS.values()) if name is None else [METHODS[name]]
    if as_json:
        data = {method.name: method_data(method) for method in chosen}
        click.echo(json.dumps(data if name is None else data[name]))
    elif name is not None:
        click.echo(method_text(chosen[0]))
    else:
        click.echo(table([("method", "what it does"), *((method.name, method.summary) for method in chosen)]))


@main.command(
    "eval",
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm eval merged/quickstart --text news.txt
  mergekit-lfm eval base merged/quickstart --text a.txt --text b.txt""",
)
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="A file of UTF-8 text. Can be given several times.",
)
@click.option(
    "--window", type=click.IntRange(min=1), help="Most tokens of context. [default: the model's, at most 2048]"
)
@click.option("--stride", type=click.IntRange(min=1), help="Tokens predicted at a time. [default: the window]")
@as_json
def evaluate(
    models: Sequence[Path], texts: Sequence[Path], window: int | None, stride: int | None, as_json: bool
) -> None:
    """Measure perplexity and bits per byte of language MODELS on texts. Less is better.

    Bits per byte compare models with different tokenizers. Over several texts the mean of the bits is the arithmetic,
    of perplexities the geometric one. Needs the extra: pip install "mergekit_lfm[models]"
    """
    from mergekit_lfm.display import evaluation_data, evaluation_text

    scores = _scores(models, {str(path): _read_text(path) for path in texts}, window, stride)
    click.echo(json.dumps(evaluation_data(scores)) if as_json else evaluation_text(scores))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: {error}; expected UTF-8 text") from None


def _scores(
    models: Sequence[Path], texts: dict[str, str], window: int | None, stride: int | None
) -> dict[str, dict[str, Perplexity]]:
    """Every model's perplexity on every text, one model in memory at a time."""
    from mergekit_lfm.evaluate import perplexity
    from mergekit_lfm.runtime import load_language_model

    scores = {}
    for path in models:
        try:
            model = load_language_model(path)
        except ImportError as error:
            raise PlanError(str(error)) from None
        scores[str(path)] = {
            name: perplexity(model, text, window=window, stride=stride) for name, text in texts.items()
        }
    return scores


if __name__ == "__main__":
    main(prog_name="mergekit-lfm")
