"""`extract-lora`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.mergekit import EXTRACTING, MergekitCommand, mergekit_notices, mergekit_options
from mergekit_lfm.commands.shell import Size


@click.command(
    cls=MergekitCommand,
    epilog="""\b
Examples:
  mergekit-lfm extract-lora models/tuned --base models/base -o tuned-lora
  mergekit-lfm extract-lora models/tuned --base org/base --energy 0.95 -o tuned-lora
  mergekit-lfm extract-lora models/tuned --base models/base --size 50MB --exclude 'layers\\.0\\.' -o tuned-lora""",
)
@click.argument("finetuned")
@click.option("--base", required=True, help="The model that was fine-tuned.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to write the adapter to.")
@click.option("--rank", type=click.IntRange(min=1), help="The rank of every product. [default: 32]")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="In place of --rank, the share of each matrix's change to keep, from 0 to 1; ranks differ.",
)
@click.option(
    "--size", type=Size(), help="In place of --rank, the size of the adapter, such as 50MB, spent where it keeps most."
)
@click.option("--include", multiple=True, metavar="REGEX", help="Extract only tensors with this in their names.")
@click.option("--exclude", multiple=True, metavar="REGEX", help="Leave out tensors with this in their names.")
@click.option("--save", multiple=True, metavar="REGEX", help="Save modules with this in their names whole.")
@click.option(
    "--embed-lora", is_flag=True, help="Make products of embeddings and heads, too; else they are saved whole."
)
@click.option("--exact", is_flag=True, help="Decompose large matrices without random numbers, in many times the time.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    help="The number format of the products. [default: float32]",
)
@options.device_option("Where matrices are decomposed")
@mergekit_options(EXTRACTING, ("--no-embed-lora",))
@options.memory
@options.threads
@options.overwrite
@options.output
@click.pass_obj
def extract_lora(console: Console, /, finetuned: str, base: str, out: Path, **values: Any) -> None:
    """Extract a LoRA for PEFT from FINETUNED: the change from BASE as products of small matrices.

    Each matrix gets the best product of its rank. Norms, biases, embeddings and heads are saved whole if they changed.
    A changed tensor that the adapter cannot hold is named. Both models are read tensor by tensor. A model is a
    folder, a name on the Hub, or MODEL+ADAPTER.
    """
    from mergekit_lfm.api.extract import extract_lora as run
    from mergekit_lfm.commands.show.extractions import done_data, done_text

    console.warn(mergekit_notices(click.get_current_context()))
    if sum(values[name] is not None for name in ("rank", "energy", "size")) > 1:
        raise click.UsageError("Give one of --rank, --energy and --size.")
    outcome = run(finetuned, base, out, progress=console.progress, **values)
    console.warn(outcome.warnings)
    console.conclude(done_data(outcome), lambda: done_text(outcome), path=out)
