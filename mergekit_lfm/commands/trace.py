"""`trace`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergekit_lfm.commands import checks, options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.shell import Command, ModelFolder
from mergekit_lfm.store.hub import display_name


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm trace models/a --facts known.yaml
  mergekit-lfm trace models/a --facts known.yaml --window 5 -o trace.json --plot trace.png""",
)
@click.argument("model", type=ModelFolder())
@click.option(
    "--facts",
    required=True,
    type=click.Path(path_type=Path),
    help="A facts file, as `edit` takes it, with facts that MODEL knows.",
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), metavar="FILE.json", help="Also write all numbers to this file."
)
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Also draw the numbers as a heat map."
)
@click.option(
    "--noise",
    type=click.FloatRange(min=0, min_open=True),
    default=3.0,
    help="How strong the noise on the subject is, in standard deviations of the subjects' embeddings. [default: 3]",
)
@click.option(
    "--window",
    type=click.IntRange(min=1),
    default=1,
    help="The number of neighbouring layers whose MLPs or attention are restored together. [default: 1]",
)
@click.option(
    "--draws",
    type=click.IntRange(min=1),
    default=2,
    help="How often the noise is drawn for each fact; more draws give steadier numbers. [default: 2]",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    default=0,
    help="The number from which the noise is drawn; the same one gives the same noise. [default: 0]",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=32, help="The number of runs of the model at once. [default: 32]"
)
@checks.running
@options.overwrite
@options.output
@click.pass_obj
def trace(
    console: Console,
    /,
    model: Path,
    facts: Path,
    out: Path | None,
    plot: Path | None,
    **values: Any,
) -> None:
    """Find the layers and tokens through which MODEL knows facts, and which layers to edit.

    Causal tracing: noise on the subject makes the model forget; then one state of the clean run is put back, at one
    layer and token; the gain of the right answer is the state's indirect effect. Give facts that the model knows, with
    its own answer as target_new. Source: Meng et al. 2022 (ROME, 2202.05262), section 2. Needs the extra:
    pip install "mergekit_lfm[models]"; for plots "mergekit_lfm[plots]"
    """
    from mergekit_lfm.api.trace import trace_facts
    from mergekit_lfm.commands.show.patches import trace_text, trace_title
    from mergekit_lfm.commands.show.plots import check_plot, plot_effects

    if plot is not None:
        check_plot(plot)
    traced = trace_facts(model, facts, out, progress=console.progress, **values).result
    data = {"model": display_name(model), **traced.as_data()}
    if plot is not None:
        plot_effects(data["effects"], plot, title=trace_title(data))
    console.conclude(data, lambda: trace_text(data))
