"""`align`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.options import needing_models
from mergekit_lfm.commands.shell import ANSWER_IS_NO, Command, ModelFolder
from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.hub import display_name

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lfm.artifacts.transform import Transform

# As `alignments.ALIGN_METHODS` has them, which is not imported for --help; a test compares them.
METHODS = ("weight_matching", "activation_matching", "ot", "rotation")


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm align models/b --to models/a -o b_to_a.safetensors
  mergekit-lfm align models/b --to models/a --method rotation -o b_to_a.safetensors --save models/b_near_a
  mergekit-lfm align models/b --to models/a --method activation_matching --stats ab.safetensors -o b_to_a.safetensors
  mergekit-lfm align models/a --check""",
)
@click.argument("model", type=ModelFolder())
@click.option("--to", type=ModelFolder(), help="The model to bring MODEL near to.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The transform file to write.")
@click.option("--method", type=click.Choice(METHODS), default=METHODS[0], help=f"[default: {METHODS[0]}]")
@click.option("--stats", type=click.Path(path_type=Path), help="Cross moments of both, as `stats cross` makes them.")
@click.option("--initial", type=click.Path(path_type=Path), help="A transform file to start from.")
@click.option(
    "--order", multiple=True, metavar="GROUP", help="Visit only these groups, in the order given. [default: all]"
)
@click.option(
    "--restarts",
    type=click.IntRange(min=1),
    help="Runs in other orders; the best is kept. [default: 10; for rotation 1]",
)
@click.option("--sweeps", type=click.IntRange(min=1), help="Most rounds over all groups. [default: 100]")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Of the random orders. [default: 0]")
@click.option(
    "--normalise/--no-normalise",
    default=None,
    help="Divide every tensor by its norm, so that all count alike. [default: for rotation]",
)
@click.option("--regularisation", type=click.FloatRange(min=0), help="For ot: Sinkhorn's; 0 is exact. [default: 0]")
@click.option("--cost", type=click.Choice(["euclidean", "squared", "cosine"]), help="For ot. [default: euclidean]")
@click.option("--device", default="cpu", help="Where matrices are multiplied: cpu, cuda, cuda:1, auto. [default: cpu]")
@click.option(
    "--save", type=click.Path(path_type=Path), help="Also write the rewritten model, and run both to compare."
)
@click.option("--check", is_flag=True, help="Only check MODEL's symmetry table, by running it.")
@options.overwrite
@options.as_json
@options.quiet
@click.pass_context
def align(
    ctx: click.Context,
    /,
    model: Path,
    to: Path | None,
    out: Path | None,
    method: str,
    stats: Path | None,
    initial: Path | None,
    order: tuple[str, ...],
    device: str,
    save: Path | None,
    check: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Rewrite MODEL into an equivalent that lies near another, for merging.

    \b
    weight_matching      permutations of units that bring the weights nearest
    activation_matching  permutations that pair units by their activations
    ot                   optimal transport of units; widths may differ; soft
    rotation             for Llama, Mistral, Qwen2, Qwen3: rotations, too

    The transform goes to a file, which a recipe applies while it merges (`align: FILE` beside a model). But for `ot`
    the rewritten model says the same as MODEL. Tables of symmetries are there for GPT-2, BERT, Llama, Mistral, Qwen2,
    Qwen3, ResNet, and for chains of linear, convolution and BatchNorm layers. What runs models, --save and --check,
    needs the extra: pip install "mergekit_lfm[models]"
    """
    if check:
        _check_alone(ctx)
        _check(ctx, model, as_json, quiet)
        return
    if to is None or out is None:
        raise click.UsageError("Give --to MODEL and -o FILE, or --check.")
    parameters = {name: value for name, value in given.items() if value is not None}
    _check_start(method, stats, initial, order)
    _check_out(out, [path for path in (model, to, stats, initial) if path], overwrite)
    if save is not None:
        _check_save(model, to, save, overwrite)
    transform = _align(model, to, out, method, stats, initial, order, device, parameters, quiet or as_json)
    from mergekit_lfm.commands.show.transforms import alignment_text, saved_text, transform_data, transform_text

    found: dict[str, Any] = {"out": str(out), **transform_data(transform)}
    same = True
    if save is not None:
        with needing_models():
            same, found["saved"] = _save(model, out, save, transform, overwrite, quiet or as_json)
    if as_json:
        click.echo(json.dumps(found))
    else:
        if not quiet:
            click.echo(transform_text(found), err=True)
            click.echo(alignment_text(found, display_name(model)), err=True)
        if save is not None:
            click.echo(f"{save}: {saved_text(found['saved'])}", err=True)
        click.echo(out)
    ctx.exit(0 if same else ANSWER_IS_NO)


def _align(
    model: Path,
    to: Path,
    out: Path,
    method: str,
    stats: Path | None,
    initial: Path | None,
    order: tuple[str, ...],
    device: str,
    parameters: dict[str, Any],
    hidden: bool,
) -> Transform:
    from mergekit_lfm.align import align_models
    from mergekit_lfm.artifacts.statistics import open_statistics
    from mergekit_lfm.artifacts.transform import open_transform
    from mergekit_lfm.commands.show.terminal import ticker

    with ticker(" groups", "aligning", hidden=hidden) as progress:
        transform = align_models(
            model,
            to,
            method,
            statistics=None if stats is None else open_statistics(stats),
            initial=None if initial is None else open_transform(initial),
            order=order or None,
            progress=progress,
            device=device,
            **parameters,
        )
    transform.save(out)
    return transform


def _check_alone(ctx: click.Context) -> None:
    """A usage error for options of an alignment beside --check, which aligns nothing."""
    wanted = {"model", "check", "as_json", "quiet"}
    given = [
        max(parameter.opts, key=len)
        for parameter in ctx.command.params
        if parameter.name not in wanted
        and ctx.get_parameter_source(parameter.name or "") is not click.core.ParameterSource.DEFAULT
    ]
    if given:
        raise click.UsageError(f"--check only looks at MODEL, and writes nothing; leave out {', '.join(given)}.")


def _check_start(method: str, stats: Path | None, initial: Path | None, order: tuple[str, ...]) -> None:
    """A usage error for what the method would not look at."""
    from mergekit_lfm.recipe.align import ALIGN_METHODS

    by_activations = stats is not None
    if initial is not None and (by_activations or not ALIGN_METHODS[method].starts):
        raise click.UsageError(f"--initial: what {method} finds does not depend on a start; leave it out.")
    if order and by_activations:
        raise click.UsageError(f"--order: {method} by activations finds every group by itself; leave it out.")


def _check_out(out: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    """PlanError where the transform must not be written to `out`, before the work."""
    from mergekit_lfm.store.places import check_file

    check_file(out, inputs, overwrite=overwrite)


def _check_save(model: Path, to: Path, save: Path, overwrite: bool) -> None:
    """PlanError where the rewritten model could not be written there, or not be run, before the work."""
    from mergekit_lfm.store.checkpoint import open_checkpoint

    if save.exists() and not overwrite:
        raise PlanError(f"{save} exists; choose another output, or use --overwrite")
    if any(
        save.resolve().is_relative_to(path) or path.is_relative_to(save.resolve())
        for path in (model.resolve(), to.resolve())
    ):
        raise PlanError(f"the output {save} and an input lie in one another; choose another output")
    source, other = open_checkpoint(model), open_checkpoint(to)
    if wider := next((name for name in source if name in other and source[name].shape != other[name].shape), None):
        raise PlanError(
            f"{model} has {source[wider]}, {to} {list(other[wider].shape)}: its config would not fit what is made of "
            "it, so it cannot be saved by itself; merge it with `align: FILE` in a recipe"
        )
    if (model / "config.json").is_file():
        with needing_models():
            from mergekit_lfm.runtime.load import import_transformers

            import_transformers()


def _save(
    model: Path, file: Path, save: Path, transform: Transform, overwrite: bool, hidden: bool
) -> tuple[bool, dict[str, Any]]:
    """Write the rewritten model through a merge of it alone; whether the outputs are the same, and the facts."""
    from mergekit_lfm.commands.show.terminal import progress_bar
    from mergekit_lfm.engine.execute import execute
    from mergekit_lfm.judge.same import compare_outputs
    from mergekit_lfm.plan.plan import make_plan
    from mergekit_lfm.recipe.recipe import Recipe

    entry = {"model": str(model), "align": str(file)}
    plan = make_plan(Recipe.parse({"merge_method": "passthrough", "models": [entry]}))
    with progress_bar(plan.bytes_written, "writing", hidden=hidden) as progress:
        execute(plan, save, overwrite=overwrite, progress=progress)
    if not (model / "config.json").is_file():
        return True, {"path": str(save), "difference": None, "tolerance": None, "same": None}
    difference, tolerance = compare_outputs(model, save, transform)
    same = not transform.facts.exact or difference <= tolerance
    return same, {"path": str(save), "difference": difference, "tolerance": tolerance, "same": same}


def _check(ctx: click.Context, model: Path, as_json: bool, quiet: bool) -> None:
    """Run the model with random elements of every group of its table; exit code 1 where the table is wrong."""
    from mergekit_lfm.align.check import check_symmetries
    from mergekit_lfm.arch import find_symmetries
    from mergekit_lfm.commands.show.terminal import counter
    from mergekit_lfm.commands.show.transforms import report_data, report_text
    from mergekit_lfm.runtime.load import load_as_saved
    from mergekit_lfm.runtime.probe import all_outputs, probe
    from mergekit_lfm.store.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model)
    if not checkpoint.config.get("architectures"):
        lacks = "whose config.json has no `architectures`" if checkpoint.config else "without a config.json"
        raise PlanError(
            f"--check runs the model: found {model} {lacks}, expected a folder with a config.json that names the "
            "model's class under `architectures`. Save the model with transformers"
        )
    symmetries = find_symmetries(checkpoint)
    tensors = {name: checkpoint.read(name).view(spec.shape) for name, spec in checkpoint.items()}

    def run(changed: Mapping[str, Tensor]) -> Tensor:
        loaded = load_as_saved(model, changed)
        return all_outputs(loaded, probe(loaded))

    with needing_models(), counter(" runs", "checking", hidden=quiet or as_json) as progress:
        report = check_symmetries(tensors, symmetries, run, progress=progress)
    found = {"model": display_name(model), **report_data(report, symmetries)}
    click.echo(json.dumps(found) if as_json else report_text(found))
    ctx.exit(0 if report.ok else ANSWER_IS_NO)
