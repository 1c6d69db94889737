"""`trace`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mergekit_lfm.commands import checks, options
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
@click.option("--facts", required=True, type=click.Path(path_type=Path), help="Facts that MODEL knows.")
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE.json", help="Write all numbers there, too.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw them as a heat map.")
@click.option(
    "--noise",
    type=click.FloatRange(min=0, min_open=True),
    default=3.0,
    help="Of the subject's embeddings, in standard deviations of them. [default: 3]",
)
@click.option(
    "--window", type=click.IntRange(min=1), default=1, help="Layers of MLPs or attention restored at once. [default: 1]"
)
@click.option("--draws", type=click.IntRange(min=1), default=2, help="Of the noise, for each fact. [default: 2]")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, help="Of the noise. [default: 0]")
@click.option("--batch", type=click.IntRange(min=1), default=32, help="Runs of the model at a time. [default: 32]")
@checks.running
@options.overwrite
@options.as_json
@options.quiet
def trace(
    model: Path,
    facts: Path,
    out: Path | None,
    plot: Path | None,
    noise: float,
    window: int,
    draws: int,
    seed: int,
    batch: int,
    dtype: str,
    device: str,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Find the layers and tokens through which MODEL knows facts, and which layers to edit.

    Causal tracing: noise on the subject makes the model forget; then one state of the clean run is put back, at one
    layer and token, and what the right answer gains is its indirect effect. The facts are those that the model knows:
    target_new is what it says. Source: Meng et al. 2022 (ROME, 2202.05262), section 2. Needs the extra:
    pip install "mergekit_lfm[models]"; for plots "mergekit_lfm[plots]"
    """
    from mergekit_lfm.artifacts.facts import read_facts_file
    from mergekit_lfm.commands.show.patches import trace_text, trace_title
    from mergekit_lfm.commands.show.plots import check_plot, plot_effects
    from mergekit_lfm.commands.show.terminal import counter
    from mergekit_lfm.store.durable import replace_file
    from mergekit_lfm.store.places import check_file

    known = read_facts_file(facts)
    if plot is not None:
        check_plot(plot)
    if out is not None:
        check_file(out, [model, facts], overwrite=overwrite)
    loaded = checks.load(model, dtype, device)
    from mergekit_lfm.edit.trace import trace as traced

    how: dict[str, Any] = {"noise": noise, "window": window, "draws": draws, "seed": seed, "batch": batch}
    with counter(" facts", "tracing", hidden=quiet or as_json) as progress:
        found = traced(loaded.model, loaded.tokenizer, known, progress=progress, **how)
    data = {"model": display_name(model), **found.as_data()}
    if out is not None:
        replace_file(out, json.dumps(data, indent=1).encode())
    if plot is not None:
        plot_effects(data["effects"], plot, title=trace_title(data))
    click.echo(json.dumps(data) if as_json else trace_text(data))
