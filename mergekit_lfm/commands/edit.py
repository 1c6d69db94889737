"""`edit`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_lfm.commands import checks, options
from mergekit_lfm.commands.shell import Command, ModelFolder
from mergekit_lfm.errors import PlanError

if TYPE_CHECKING:
    from mergekit_lfm.artifacts.facts import FactsFile
    from mergekit_lfm.artifacts.patch import Patch
    from mergekit_lfm.artifacts.statistics import Statistics

# As `edits.EDIT_METHODS` has them, which is not imported for --help; a test compares them.
METHODS = ("memit", "rome")


class Layers(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5 only
    """Numbers of layers: 5, or 3,4,5, or 3-5."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """The numbers that `value` says, in its order; a usage error where it says none."""
        if isinstance(value, list):
            return value
        numbers: list[int] = []
        for part in str(value).split(","):
            first, dash, last = part.strip().partition("-")
            good = first.isdecimal() and (not dash or last.isdecimal())
            if not good or (dash and int(last) < int(first)):
                self.fail(f"{value!r} is no list of layers; expected one like 5, or 3,4,5, or 3-5", param, ctx)
            numbers += range(int(first), int(last or first) + 1)
        return numbers


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm edit models/a --facts facts.yaml --stats a.gram.safetensors -o patch.safetensors
  mergekit-lfm edit models/a --facts facts.yaml --stats a.gram.safetensors --layers 3-8 --clamp 1.5
    --min-efficacy 0.9 -o patch.safetensors --save models/a-edited
  mergekit-lfm edit models/a --facts one.yaml --method rome --layers 5 --identity -o patch.safetensors""",
)
@click.argument("model", type=ModelFolder())
@click.option("--facts", required=True, type=click.Path(path_type=Path), help="The facts file: YAML, JSON or JSONL.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The patch file to write.")
@click.option("--method", type=click.Choice(METHODS), default=METHODS[0], help=f"[default: {METHODS[0]}]")
@click.option("--stats", type=click.Path(path_type=Path), help="Second moments of MODEL, as `stats gram` makes them.")
@click.option("--identity", is_flag=True, help="Edit without statistics: all directions of the inputs count alike.")
@click.option("--layers", type=Layers(), help="Layers to edit: 5, or 3,4,5, or 3-5. [default: a band by depth]")
@click.option("--preset", help="Constants published for a model, such as gpt-j-6b.")
@click.option("--config", type=click.Path(path_type=Path), help="A YAML file of options; those given here go first.")
@click.option("--steps", type=click.IntRange(min=1), help="Most steps of the search for new values.")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), help="Learning rate of that search.")
@click.option("--weight-decay", type=click.FloatRange(min=0), help="Weight of the size of the change in its loss.")
@click.option("--kl-factor", type=click.FloatRange(min=0), help="Weight of what the subject is otherwise in its loss.")
@click.option("--clamp", type=click.FloatRange(min=0, min_open=True), help="Largest change, relative to the state.")
@click.option("--lambda", "lambda_", type=click.FloatRange(min=0), help="memit: weight of what is known already.")
@click.option("--lambda-ratio", type=click.FloatRange(min=0), help="memit: the same, as a multiple of the width.")
@click.option("--ridge", type=click.FloatRange(min=0), help="Added to the statistics, relative to their mean.")
@click.option("--loss-threshold", type=click.FloatRange(min=0), help="The search ends below this loss.")
@click.option(
    "--key", type=click.Choice(["rome", "mean", "bare"]), help="rome: of which texts the key is. [default: rome]"
)
@click.option("--allow-same-subject", is_flag=True, default=None, help="memit: take several facts about one subject.")
@click.option("--batch", type=click.IntRange(min=1), help="Facts at a time; the result is the same. [default: 25]")
@checks.running
@click.option("--save", type=click.Path(path_type=Path), help="Also apply the patch: the folder to write.")
@checks.verifying
@options.overwrite
@options.as_json
@options.quiet
@click.pass_context
def edit(
    ctx: click.Context,
    /,
    model: Path,
    facts: Path,
    out: Path,
    method: str,
    stats: Path | None,
    identity: bool,
    preset: str | None,
    config: Path | None,
    dtype: str,
    device: str,
    save: Path | None,
    min_efficacy: float | None,
    no_verify: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Change facts that MODEL says, and write the change as a patch.

    \b
    memit  many facts at once, spread over several layers
    rome   one fact after another, in one layer

    The facts file names subjects, prompts and new targets. The patch is small, and is applied, shown and undone by
    `patch`; MODEL is left as it is. Afterwards the patched model is judged as the files will hold it: ES, PS, NS are
    shares of prompts, paraphrases and other subjects where the right target is the more likely one; EA, PA, NA where
    its tokens are the most likely of all; SA and unedited the same of other facts, about the same subjects and others.
    Look at all of them: an edit that succeeds may damage the rest. Needs the extra: pip install "mergekit_lfm[models]"
    """
    hidden = quiet or as_json
    checks.check_verifying(min_efficacy, no_verify)
    asked = _read_options(method, config, preset, given)
    if (stats is None) != (asked.pop("covariance", None) == "identity" or identity):
        raise click.UsageError("Give --stats FILE, or --identity to edit without statistics.")
    known = _read_facts(facts)
    inputs = [path for path in (model, facts, stats, config) if path is not None]
    _check_places(inputs, out, save, overwrite)
    covariance = "identity" if stats is None else _open_gram(stats)
    before, patch = _solve(model, known, method, covariance, asked, dtype, device, no_verify, hidden)
    patch.save(out)
    found = {"out": str(out), "facts": len(known.facts), "before": before}
    if save is not None:
        found["saved"] = _save(model, out, save, overwrite, hidden)
    found["after"] = None if no_verify else _judged(model, out, save, known, dtype, device, hidden)
    _show(ctx, model, found, min_efficacy, as_json, quiet)


def _read_options(method: str, config: Path | None, preset: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the file and of the line, which go first, checked; by the names that `edit` has for them."""
    from mergekit_lfm.recipe.edit import edit_options
    from mergekit_lfm.store.yaml import read_yaml

    asked: dict[str, Any] = {}
    if config is not None:
        written = read_yaml(config.read_text(encoding="utf-8"), str(config))
        if not isinstance(written, dict):
            raise PlanError(f"{config}: found {written!r:.60}, expected options of `edit`, such as `steps: 25`")
        asked |= written
    line = {"lambda" if name == "lambda_" else name: value for name, value in given.items() if value is not None}
    if "lambda" in line or "lambda_ratio" in line:  # one says what the other does
        asked = {name: value for name, value in asked.items() if name not in ("lambda", "lambda_ratio")}
    asked |= line | ({} if preset is None else {"preset": preset})
    edit_options(method, asked, place=str(config or "edit"))
    return {"lambda_" if name == "lambda" else name: value for name, value in asked.items()}


def _read_facts(path: Path) -> FactsFile:
    from mergekit_lfm.artifacts.facts import read_facts_file

    return read_facts_file(path)


def _check_places(inputs: list[Path], out: Path, save: Path | None, overwrite: bool) -> None:
    """PlanError where an output must not be written, before the work."""
    from mergekit_lfm.store.places import check_file

    check_file(out, inputs, overwrite=overwrite)
    if save is not None:
        if out.resolve().is_relative_to(save.resolve()):
            raise PlanError(f"the patch {out} would lie in the folder {save}, which is written, too; choose another")
        checks.check_new_folder(save, inputs, overwrite=overwrite)


def _open_gram(path: Path) -> Statistics:
    from mergekit_lfm.artifacts.statistics import open_statistics

    statistics = open_statistics(path)
    if statistics.facts.kind != "gram":
        raise PlanError(
            f"{path} holds {statistics.facts.kind} statistics, expected second moments of the model's layers; collect "
            "them with `mergekit-lfm stats gram`"
        )
    return statistics


def _solve(
    model: Path,
    facts: FactsFile,
    method: str,
    covariance: Statistics | str,
    asked: Mapping[str, Any],
    dtype: str,
    device: str,
    no_verify: bool,
    hidden: bool,
) -> tuple[dict[str, Any] | None, Patch]:
    """The scores of the model as it is, unless nothing is to be verified, and the patch."""
    from mergekit_lfm.commands.show.terminal import counter
    from mergekit_lfm.edit import edit as solved

    loaded = checks.load(model, dtype, device)
    with counter(" facts", "editing", hidden=hidden) as progress:
        patch = solved(
            loaded,
            loaded.tokenizer,
            facts,
            method=method,
            covariance=covariance,
            progress=progress,
            **asked,
        )
    before = None if no_verify else checks.score(loaded, facts, "judging", hidden).as_data()  # it is as it was
    return before, patch


def _save(model: Path, patch: Path, save: Path, overwrite: bool, hidden: bool) -> dict[str, Any]:
    """Write the edited model; where it is, and what undoes it."""
    from mergekit_lfm.api.patches import apply_patches
    from mergekit_lfm.commands.show.patches import apply_data
    from mergekit_lfm.commands.show.terminal import progress_bar
    from mergekit_lfm.store.checkpoint import open_checkpoint

    with progress_bar(open_checkpoint(model).nbytes, "writing", hidden=hidden) as progress:
        return apply_data(apply_patches(model, [patch], save, overwrite=overwrite, progress=progress))


def _judged(
    model: Path, patch: Path, save: Path | None, facts: FactsFile, dtype: str, device: str, hidden: bool
) -> dict[str, Any]:
    """The scores of the edited model as its files have it: of the folder, or of the model through the patch."""
    from mergekit_lfm.artifacts.patch import open_patch
    from mergekit_lfm.store.checkpoint import open_checkpoint
    from mergekit_lfm.views.patched import patched_view

    edited = patched_view(open_checkpoint(model), open_patch(patch)) if save is None else save
    return checks.score(checks.load(edited, dtype, device), facts, "verifying", hidden).as_data()


def _show(
    ctx: click.Context,
    model: Path,
    found: dict[str, Any],
    min_efficacy: float | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Print what was done, as it was asked for, and end with the code for it."""
    from mergekit_lfm.artifacts.patch import open_patch
    from mergekit_lfm.commands.show.patches import changes_data, edit_text, rounding_warnings
    from mergekit_lfm.store.checkpoint import open_checkpoint

    found["tensors"] = changes_data(open_patch(Path(found["out"])), open_checkpoint(model))
    found["warnings"] = rounding_warnings(found["tensors"])
    where = found["saved"]["out"] if "saved" in found else found["out"]
    checks.conclude(ctx, found, edit_text, where, min_efficacy, as_json=as_json, quiet=quiet)
