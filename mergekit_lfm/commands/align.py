"""`align`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import ANSWER_IS_NO, Console
from mergekit_lfm.commands.parameters import method_option, method_rows, parameter_options
from mergekit_lfm.commands.shell import Command, ModelFolder
from mergekit_lfm.recipe.registry import ALIGN_METHODS
from mergekit_lfm.store.hub import display_name

if TYPE_CHECKING:
    from mergekit_lfm.api.align import Aligned

HELP = f"""Rewrite MODEL into an equivalent that lies near another, for merging.

\b
{method_rows(ALIGN_METHODS)}

The transform goes to a file, which a recipe applies while it merges (`align: FILE` beside a model). With every
method but `ot` the rewritten model gives the same outputs as MODEL. Known are the symmetries of GPT-2, BERT, Llama,
Mistral, Qwen2, Qwen3, ResNet, and of chains of linear, convolution and BatchNorm layers. If OUT holds the transform
of the same request already, nothing is done. MODEL and the rewritten model run, to compare their outputs, if they
have a config.json, fit the memory (a quarter of the machine's, at most 4 GB) and transformers is installed; else the
transform says that they did not. --save and --check run models in any case. That needs the extra:
pip install "mergekit_lfm[models]"
"""


@click.command(
    cls=Command,
    help=HELP,
    epilog="""\b
Examples:
  mergekit-lfm align models/b --to models/a -o b_to_a.safetensors
  mergekit-lfm align models/b --to models/a --method rotation -o b_to_a.safetensors --save models/b_near_a
  mergekit-lfm align models/b --to models/a --method activation_matching --stats ab.safetensors -o b_to_a.safetensors
  mergekit-lfm align models/a --check""",
)
@click.argument("model", type=ModelFolder())
@click.option("--to", type=ModelFolder(), help="The model that MODEL is brought near.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The transform file to write.")
@method_option(ALIGN_METHODS, "weight_matching", "How the units of the two models are matched; see above.")
@click.option(
    "--stats",
    type=click.Path(path_type=Path),
    help="Match units by their activations: the file that `stats cross` wrote for the two models.",
)
@click.option(
    "--initial", type=click.Path(path_type=Path), help="A transform file to start from, in place of no change."
)
@click.option(
    "--order",
    multiple=True,
    metavar="GROUP",
    help="Visit only these groups, in the order given. Can be given several times. [default: all]",
)
@parameter_options(ALIGN_METHODS)
@options.device_option("Where matrices are multiplied")
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    help="Also write the rewritten model to this folder, and compare the outputs even of large models.",
)
@click.option(
    "--check", is_flag=True, help="Align nothing: only test the symmetries that are known of MODEL, by running it."
)
@options.overwrite
@options.output
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
    **parameters: Any,
) -> None:
    """Find the transform, or only check the table of symmetries."""
    if check:
        _check_alone(ctx)
        _check(ctx.obj, model)
    if to is None or out is None:
        raise click.UsageError("Give --to MODEL and -o FILE, or --check.")
    _check_start(method, stats, initial, order)
    from mergekit_lfm.api.align import align_models

    console: Console = ctx.obj
    outcome = align_models(
        model,
        to,
        out,
        method=method,
        stats=stats,
        initial=initial,
        order=order or None,
        device=device,
        save=save,
        overwrite=overwrite,
        progress=console.progress,
        **{name: value for name, value in parameters.items() if value is not None},
    )
    _conclude(console, outcome, model)


def _conclude(console: Console, outcome: Aligned, model: Path) -> NoReturn:
    from mergekit_lfm.artifacts.transform import DIFFERENT
    from mergekit_lfm.commands.show.transforms import alignment_data, alignment_text, saved_text, transform_text

    data = alignment_data(outcome)
    console.warn(outcome.warnings)
    if outcome.already_there:
        console.say("already there: the transform of the same request; nothing was done")
    console.conclude(
        data,
        lambda: "\n".join([transform_text(data), alignment_text(data, display_name(model))]),
        path=outcome.path,
        code=ANSWER_IS_NO if outcome.result.info.outputs == DIFFERENT else 0,
        why=[] if outcome.saved is None else [f"{outcome.saved.path}: {saved_text(data['saved'])}"],
    )


def _check_alone(ctx: click.Context) -> None:
    """Raise a usage error for options of an alignment beside --check, which aligns nothing."""
    allowed = {"model", "check", "as_json", "quiet", "log", "report"}
    others = [
        max(parameter.opts, key=len)
        for parameter in ctx.command.params
        if parameter.name not in allowed
        and ctx.get_parameter_source(parameter.name or "") is not click.core.ParameterSource.DEFAULT
    ]
    if others:
        raise click.UsageError(f"--check only looks at MODEL, and writes nothing; leave out {', '.join(others)}.")


def _check_start(method: str, stats: Path | None, initial: Path | None, order: tuple[str, ...]) -> None:
    """Raise a usage error for options that the method would ignore."""
    if initial is not None and (stats is not None or not ALIGN_METHODS[method].starts):
        raise click.UsageError(f"--initial: the result of {method} does not depend on a start; leave it out.")
    if order and stats is not None:
        raise click.UsageError(f"--order: {method} by activations finds every group by itself; leave it out.")


def _check(console: Console, model: Path) -> NoReturn:
    """Test the table of the model's symmetries; exit with code 1 if it is wrong."""
    from mergekit_lfm.api.align import check_table
    from mergekit_lfm.commands.show.transforms import report_data, report_text

    checked = check_table(model, progress=console.progress).result
    data = {"model": display_name(model), **report_data(checked.report, checked.symmetries)}
    console.conclude(data, lambda: report_text(data), code=0 if checked.report.ok else ANSWER_IS_NO)
