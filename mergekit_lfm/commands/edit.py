"""`edit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergekit_lfm.commands import checks, options
from mergekit_lfm.commands.shell import Command, ModelFolder

# As `recipe.edit.EDIT_METHODS` has them, which is not imported for --help; a test compares them.
METHODS = ("memit", "rome")


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


@click.command(
    cls=Command,
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
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default=METHODS[0],
    help=f"How the weights are changed; see above. [default: {METHODS[0]}]",
)
@click.option(
    "--stats",
    type=click.Path(path_type=Path),
    help="The file that `stats gram` wrote for MODEL; with it the edit spares what MODEL knows otherwise.",
)
@click.option("--identity", is_flag=True, help="Edit without --stats: protect all directions of the inputs alike.")
@click.option(
    "--layers",
    type=Layers(),
    help="The layers to change: 5, or 3,4,5, or 3-5. [default: for memit those from 1/8 to 1/4 of the depth, for rome "
    "the one at 1/6]",
)
@click.option("--preset", help="Use the constants published for a model, such as gpt-j-6b.")
@click.option(
    "--config", type=click.Path(path_type=Path), help="Read options from this YAML file; those given here go first."
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help="Stop the search for a layer's new output after this many steps. [default: memit 25, rome 20]",
)
@click.option(
    "--lr", type=click.FloatRange(min=0, min_open=True), help="The learning rate of that search. [default: 0.5]"
)
@click.option(
    "--weight-decay",
    type=click.FloatRange(min=0),
    help="How strongly that search avoids large changes. [default: 0.5]",
)
@click.option(
    "--kl-factor",
    type=click.FloatRange(min=0),
    help="How strongly that search keeps what the model says of the subject otherwise. [default: 0.0625]",
)
@click.option(
    "--clamp",
    type=click.FloatRange(min=0, min_open=True),
    help="The largest change of a layer's output, as a multiple of its size. [default: memit 0.75, rome 4]",
)
@click.option(
    "--lambda",
    "lambda_",
    type=click.FloatRange(min=0),
    help="For memit: how strongly existing knowledge is protected, as in the paper. [default: see --lambda-ratio]",
)
@click.option(
    "--lambda-ratio",
    type=click.FloatRange(min=0),
    help="For memit: the same, as a multiple of the layer's number of inputs. [default: 1]",
)
@click.option(
    "--ridge",
    type=click.FloatRange(min=0),
    help="Added to the diagonal of the statistics, as a multiple of its mean, so that they can be inverted. "
    "[default: 0.001]",
)
@click.option(
    "--loss-threshold", type=click.FloatRange(min=0), help="End the search when its loss is below this. [default: 0.05]"
)
@click.option(
    "--key",
    type=click.Choice(["rome", "mean", "bare"]),
    help="For rome: the texts that stand for the subject: mean takes the prompt in several contexts, bare the prompt "
    "alone, rome mixes both as the authors do. [default: rome]",
)
@click.option(
    "--allow-same-subject", is_flag=True, default=None, help="For memit: accept several facts about one subject."
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    help="The number of facts that the model reads at once; the result is the same. [default: 25]",
)
@checks.running
@click.option("--save", type=click.Path(path_type=Path), help="Also write the edited model to this folder.")
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
    identity: bool,
    min_efficacy: float | None,
    no_verify: bool,
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Change facts that MODEL says, and write the change as a patch.

    \b
    memit  many facts at once, spread over several layers
    rome   one fact after another, in one layer

    The facts file names subjects, prompts and new targets. The patch is small; `patch` shows, applies and undoes it;
    MODEL is left as it is. Afterwards the patched model is judged as its files hold it: ES, PS, NS are
    shares of prompts, paraphrases and other subjects where the right target is the more likely one; EA, PA, NA where
    its tokens are the most likely of all; SA and unedited the same of other facts, about the same subjects and others.
    Look at all of them: an edit that succeeds may damage the rest. If OUT holds the patch of the same request already,
    it is not made again. Needs the extra: pip install "mergekit_lfm[models]"
    """
    from mergekit_lfm.api.edit import edit_model
    from mergekit_lfm.commands.show.patches import edit_data, edit_text
    from mergekit_lfm.commands.show.terminal import Terminal

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
        progress=Terminal(hidden=quiet or as_json),
        **chosen,
    )
    edited = outcome.result
    where = out if edited.saved is None else edited.saved.path
    judged = (edited.after, min_efficacy, edited.good)
    checks.conclude(ctx, edit_data(outcome), edit_text, *judged, where=where, as_json=as_json, quiet=quiet)
