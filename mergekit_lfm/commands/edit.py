"""`edit`."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from mergekit_lfm.commands import checks, options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.parameters import method_option, method_rows, parameter_options
from mergekit_lfm.commands.shell import Command, ModelFolder
from mergekit_lfm.methods.kinds import EditMethod
from mergekit_lfm.recipe.registry import EDIT_METHODS


class Layers(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5 only
    """Numbers of layers: 5, or 3,4,5, or 3-5."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """The numbers in `value`, in its order; a usage error for any other text."""
        if isinstance(value, list):
            return value
        numbers: list[int] = []
        for text in str(value).split(","):
            first, dash, last = text.strip().partition("-")
            good = first.isdecimal() and (not dash or last.isdecimal())
            if not good or (dash and int(last) < int(first)):
                self.fail(f"{value!r} is not a list of layers; expected one like 5, or 3,4,5, or 3-5", param, ctx)
            numbers += range(int(first), int(last or first) + 1)
        return numbers


HELP = f"""Change facts that MODEL says, and write the change as a patch.

\b
{method_rows(EDIT_METHODS)}

The facts file names subjects, prompts and new targets. The patch is small; `patch` shows, applies and undoes it;
MODEL is left as it is. Afterwards the patched model is judged as its files hold it: ES, PS, NS are
shares of prompts, paraphrases and other subjects where the right target is the more likely one; EA, PA, NA where
its tokens are the most likely of all; GA and QA where the model's own words say the fact, after the prompt and when
it is asked; SA and unedited are as EA, of other facts, about the same subjects and others.
Look at all of them: an edit that succeeds may damage the rest. If OUT holds the patch of the same request already,
it is not made again. A patch that changes no weight is written, too, but then the exit code is 1. Needs the extra:
pip install "mergekit_lfm[models]"
"""


def _bands() -> str:
    """The default layers of each method, in words."""

    def band(method: EditMethod[Any]) -> str:
        first, last = (Fraction(share).limit_denominator(100) for share in method.band)
        return f"those from {first} to {last} of the depth" if method.several else f"the one at {first}"

    return ", ".join(f"for {method.name} {band(method)}" for method in EDIT_METHODS.values())


@click.command(
    cls=Command,
    help=HELP,
    epilog="""\b
Examples:
  mergekit-lfm edit models/a --facts facts.yaml --stats a.gram.safetensors -o patch.safetensors
  mergekit-lfm edit models/a --facts facts.yaml --stats a.gram.safetensors --layers 3-8 --clamp 1.5 \\
    --min-efficacy 0.9 -o patch.safetensors --save models/a-edited
  mergekit-lfm edit models/a --facts one.yaml --method rome --layers 5 --identity -o patch.safetensors""",
)
@click.argument("model", type=ModelFolder())
@click.option(
    "--facts",
    required=True,
    type=click.Path(path_type=Path),
    help="The file with the facts that the edited model shall say: YAML, JSON or JSONL.",
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The patch file to write.")
@method_option(EDIT_METHODS, "memit", "How the weights are changed; see above.")
@click.option(
    "--stats",
    type=click.Path(path_type=Path),
    help="The file that `stats gram` wrote for MODEL; with it the edit spares what MODEL knows otherwise.",
)
@click.option("--identity", is_flag=True, help="Edit without --stats: protect all directions of the inputs alike.")
@click.option(
    "--layers",
    type=Layers(),
    help=f"The layers to change: 5, or 3,4,5, or 3-5. [default: {_bands()}]",
)
@click.option("--preset", help="Use the constants published for a model, such as gpt-j-6b.")
@click.option(
    "--config", type=click.Path(path_type=Path), help="Read options from this YAML file; those given here go first."
)
@parameter_options(EDIT_METHODS)
@checks.running
@click.option("--save", type=click.Path(path_type=Path), help="Also write the edited model to this folder.")
@checks.verifying
@options.overwrite
@options.output
@click.pass_obj
def edit(
    console: Console,
    /,
    model: Path,
    facts: Path,
    out: Path,
    identity: bool,
    min_efficacy: float | None,
    no_verify: bool,
    **values: Any,
) -> None:
    """Make the patch, and judge the edited model."""
    from mergekit_lfm.api.edit import edit_model
    from mergekit_lfm.commands.show.patches import edit_data, edit_text

    checks.check_verifying(min_efficacy, no_verify)
    chosen = {name: value for name, value in values.items() if value is not None}
    if identity:
        chosen["covariance"] = "identity"
    outcome = edit_model(
        model,
        facts,
        out,
        verify=not no_verify,
        min_efficacy=min_efficacy,
        progress=console.progress,
        **chosen,
    )
    edited = outcome.result
    path = out if edited.saved is None else edited.saved.path
    checks.conclude_edit(console, edit_data(outcome), edit_text, edited, min_efficacy, path)
