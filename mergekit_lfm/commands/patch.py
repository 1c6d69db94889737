"""`patch show`, `patch apply` and `patch undo`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_lfm.commands import checks, options
from mergekit_lfm.commands.options import going_on_later, needing_models
from mergekit_lfm.commands.shell import Command, ModelFolder
from mergekit_lfm.errors import PlanError

if TYPE_CHECKING:
    from mergekit_lfm.api.patches import Applied
    from mergekit_lfm.artifacts.facts import FactsFile


@click.group(
    epilog="""\b
Examples:
  mergekit-lfm patch show patch.safetensors
  mergekit-lfm patch apply models/a patch.safetensors -o models/a-edited
  mergekit-lfm patch undo models/a-edited -o models/a-again"""
)
def patch() -> None:
    """Show, apply and undo patches: files with what changes in a model, as `edit` writes them."""


@patch.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm patch show patch.safetensors
  mergekit-lfm patch show models/a-edited.undo.safetensors --json""",
)
@click.argument("file", metavar="PATCH", type=click.Path(path_type=Path))
@options.as_json
def show(file: Path, as_json: bool) -> None:
    """Say what a patch changes, of which model, how it was made, and what it teaches."""
    from mergekit_lfm.artifacts.patch import open_patch
    from mergekit_lfm.commands.show.patches import patch_data, patch_text

    data = {"path": str(file), **patch_data(open_patch(file))}
    click.echo(json.dumps(data) if as_json else patch_text(data))


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
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--any-base", is_flag=True, help="Apply to tensors of other values than the patch was made for, too.")
@checks.verifying
@checks.running
@options.memory
@options.threads
@options.overwrite
@options.as_json
@options.quiet
@click.pass_context
def apply(
    ctx: click.Context,
    /,
    model: Path,
    patches: Sequence[Path],
    out: Path,
    min_efficacy: float | None,
    no_verify: bool,
    dtype: str,
    device: str,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Write MODEL with patches applied to a new folder, and beside it OUT.undo.safetensors.

    Only the tensors that are changed are computed, and rounded once; all others are copied as they are. Afterwards the
    new model is loaded from its files and asked for the facts that the patches teach, which needs the extra:
    pip install "mergekit_lfm[models]"; --no-verify does without.
    """
    from mergekit_lfm.commands.show.patches import apply_data, apply_text

    hidden = quiet or as_json
    checks.check_verifying(min_efficacy, no_verify)
    facts = None if no_verify else _facts_of(patches)
    if facts is None and min_efficacy is not None:
        raise PlanError("--min-efficacy: the patches teach no facts, expected some to judge the model by; leave it out")
    if facts is not None:
        _check_runs(model)
    applied = _apply(ctx, model, patches, out, hidden, **given)
    after = None if facts is None else checks.score(checks.load(out, dtype, device), facts, "verifying", hidden)
    found = {**apply_data(applied), "after": after and after.as_data()}
    checks.conclude(ctx, found, apply_text, out, min_efficacy, as_json=as_json, quiet=quiet)


def _facts_of(patches: Sequence[Path]) -> FactsFile | None:
    """What the patches teach, the last word on each prompt; None where they teach nothing."""
    from mergekit_lfm.artifacts.facts import FactsFile, as_facts
    from mergekit_lfm.artifacts.patch import open_patch

    files = [as_facts(said) for said in (open_patch(path).facts.facts for path in patches) if said]
    facts = {fact.text: fact for file in files for fact in file.facts}
    others = {other.prompt: other for file in files for other in file.unedited if other.prompt not in facts}
    return FactsFile(tuple(facts.values()), tuple(others.values())) if facts else None


def _check_runs(model: Path) -> None:
    """PlanError where the edited model could not be run to verify it, before anything is written."""
    with needing_models():
        from mergekit_lfm.runtime.load import import_transformers

        import_transformers()
    if not (model / "config.json").is_file():
        raise PlanError(
            f"{model}: found no config.json there, so that the edited model cannot be run to verify it; expected the "
            "folder of a saved model. Give one, or use --no-verify"
        )


def _apply(ctx: click.Context, model: Path, patches: Sequence[Path], out: Path, hidden: bool, **given: Any) -> Applied:
    from mergekit_lfm.api.patches import apply_patches
    from mergekit_lfm.commands.show.terminal import progress_bar
    from mergekit_lfm.store.checkpoint import open_checkpoint

    nbytes = open_checkpoint(model).nbytes
    with going_on_later(ctx, out), progress_bar(nbytes, "applying", hidden=hidden) as progress:
        return apply_patches(model, patches, out, progress=progress, **given)


@patch.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm patch undo models/a-edited -o models/a-again
  mergekit-lfm patch undo models/a-edited --undo kept/a.undo.safetensors -o models/a-again
  mergekit-lfm patch undo models/a-edited --base models/a -o models/a-again""",
)
@click.argument("edited", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option(
    "--undo",
    type=click.Path(path_type=Path),
    help="The file that applying has left. [default: EDITED.undo.safetensors]",
)
@click.option("--base", type=ModelFolder(), help="In its place, the model that was edited.")
@options.memory
@options.threads
@options.overwrite
@options.as_json
@options.quiet
@click.pass_context
def undo(
    ctx: click.Context, /, edited: Path, out: Path, undo: Path | None, as_json: bool, quiet: bool, **given: Any
) -> None:
    """Write the model EDITED as it was before patches were applied to it, to the byte.

    The original tensors are taken from the file that applying has left, or from the model that was edited.
    """
    from mergekit_lfm.api.patches import undo_patches
    from mergekit_lfm.commands.show.patches import apply_data, apply_text
    from mergekit_lfm.commands.show.terminal import progress_bar
    from mergekit_lfm.store.checkpoint import open_checkpoint

    if undo is not None and given["base"] is not None:
        raise click.UsageError("Give --undo FILE or --base MODEL, not both.")
    nbytes = open_checkpoint(edited).nbytes
    with going_on_later(ctx, out), progress_bar(nbytes, "undoing", hidden=quiet or as_json) as progress:
        found = apply_data(undo_patches(edited, out, undo=undo, progress=progress, **given))
    if as_json:
        click.echo(json.dumps(found))
        return
    if not quiet:
        click.echo(apply_text(found), err=True)
    click.echo(out)
