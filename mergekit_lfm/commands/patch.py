"""`patch show`, `patch apply`, `patch undo` and `patch export`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mergekit_lfm.commands import checks, options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.options import going_on_later
from mergekit_lfm.commands.shell import Command, Group, ModelFolder


@click.group(
    cls=Group,
    epilog="""\b
Examples:
  mergekit-lfm patch show patch.safetensors
  mergekit-lfm patch apply models/a patch.safetensors -o models/a-edited
  mergekit-lfm patch undo models/a-edited -o models/a-again""",
)
def patch() -> None:
    """Show, apply, undo and export patches: files with what changes in a model, as `edit` writes them."""


@patch.command(
    "show",
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm patch show patch.safetensors
  mergekit-lfm patch show models/a-edited.undo.safetensors --json""",
)
@click.argument("file", metavar="PATCH", type=click.Path(path_type=Path))
@options.as_json
@click.pass_obj
def show_patch(console: Console, /, file: Path) -> None:
    """Print a patch's changes, its model, the method that made it, and the facts that it teaches."""
    from mergekit_lfm.artifacts.patch import open_patch
    from mergekit_lfm.commands.show.patches import patch_data, patch_text

    data = {"path": str(file), **patch_data(open_patch(file))}
    console.conclude(data, lambda: patch_text(data))


@patch.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm patch apply models/a patch.safetensors -o models/a-edited
  mergekit-lfm patch apply models/a first.safetensors second.safetensors --min-efficacy 0.9 -o models/a-edited
  mergekit-lfm patch apply models/tuned patch.safetensors --any-base --no-verify -o models/tuned-edited""",
)
@click.argument("model", type=ModelFolder())
@click.argument("patches", metavar="PATCH...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to write the new model to."
)
@click.option(
    "--any-base",
    is_flag=True,
    help="Apply the patch even if the tensors of MODEL have other values than the model it was made for.",
)
@checks.verifying
@checks.running
@options.memory
@options.threads
@options.overwrite
@options.output
@click.pass_obj
def apply(
    console: Console,
    /,
    model: Path,
    patches: Sequence[Path],
    out: Path,
    min_efficacy: float | None,
    no_verify: bool,
    **values: Any,
) -> None:
    """Write MODEL with patches applied to a new folder, and beside it OUT.undo.safetensors.

    Only the tensors that change are computed, and rounded once; all others are copied as they are. Afterwards the
    new model is loaded from its files and scored on the facts that the patches teach, which needs the extra:
    pip install "mergekit_lfm[models]"; --no-verify does without. If no tensor changes, OUT is written all the same, and
    the exit code is 1.
    """
    from mergekit_lfm.api.patches import apply_patches
    from mergekit_lfm.commands.show.patches import apply_data, apply_text

    checks.check_verifying(min_efficacy, no_verify)
    with going_on_later(out):
        outcome = apply_patches(
            model,
            patches,
            out,
            verify=not no_verify,
            min_efficacy=min_efficacy,
            progress=console.progress,
            **values,
        )
    applied = outcome.result
    data = {**apply_data(outcome), "after": None if applied.after is None else applied.after.as_data()}
    checks.conclude_edit(console, data, apply_text, applied, min_efficacy, out)


@patch.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm patch undo models/a-edited -o models/a-again
  mergekit-lfm patch undo models/a-edited --undo kept/a.undo.safetensors -o models/a-again
  mergekit-lfm patch undo models/a-edited --base models/a -o models/a-again""",
)
@click.argument("edited", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to write the new model to."
)
@click.option(
    "--undo",
    type=click.Path(path_type=Path),
    help="The file that `patch apply` wrote to undo it. [default: EDITED.undo.safetensors]",
)
@click.option("--base", type=ModelFolder(), help="In place of that file, the model that was edited.")
@options.memory
@options.threads
@options.overwrite
@options.output
@click.pass_obj
def undo(console: Console, /, edited: Path, out: Path, undo: Path | None, **values: Any) -> None:
    """Write the model EDITED as it was before patches were applied to it, to the byte.

    The original tensors come from the file that `patch apply` wrote beside it, or from the model that was edited.
    """
    from mergekit_lfm.api.patches import undo_patches
    from mergekit_lfm.commands.show.patches import apply_data, apply_text

    if undo is not None and values["base"] is not None:
        raise click.UsageError("Give --undo FILE or --base MODEL, not both.")
    with going_on_later(out):
        outcome = undo_patches(edited, out, undo=undo, progress=console.progress, **values)
    data = apply_data(outcome)
    console.warn(outcome.warnings)
    console.conclude(data, lambda: apply_text(data), path=out)


@patch.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm patch export patch.safetensors --base models/a -o patch-lora
  mergekit-lfm patch export first.safetensors second.safetensors --base org/a --rank 16 -o patch-lora""",
)
@click.argument("patches", metavar="PATCH...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to write the adapter to.")
@click.option(
    "--base",
    help="The model that the patches are for. [default: names are taken from the patches, and no tensor whole]",
)
@click.option(
    "--rank", type=click.IntRange(min=1), help="The most that a product for a dense change has. [default: its rank]"
)
@options.overwrite
@options.output
@click.pass_obj
def export(console: Console, /, patches: Sequence[Path], out: Path, **values: Any) -> None:
    """Write patches as one adapter (LoRA) for PEFT.

    Products of a patch keep their rank; a dense change becomes its best product. A replaced tensor is whole in the
    adapter, with the others of its module, which come from the model given by --base.
    """
    from mergekit_lfm.api.export import export_patches
    from mergekit_lfm.commands.show.extractions import export_data, export_text

    outcome = export_patches(patches, out, **values)
    data = export_data(outcome)
    console.warn(outcome.warnings)
    console.conclude(data, lambda: export_text(data), path=out)
