"""`tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.options import going_on_later
from mergekit_lfm.commands.parameters import method_option, method_rows, parameter_options
from mergekit_lfm.commands.shell import Command
from mergekit_lfm.machine.launch import rank
from mergekit_lfm.recipe.loss_terms import LOSS_TERMS
from mergekit_lfm.recipe.registry import TUNE_METHODS
from mergekit_lfm.recipe.training import SCHEDULES
from mergekit_lfm.runtime.tasks import TUNE_TASKS


def _terms() -> str:
    return "\n".join(f"  {term.name:7} {term.summary}" for term in LOSS_TERMS.values())


HELP = f"""Train MODEL on data by a method, and write the tuned model, a patch, an adapter or a prompt.

\b
{method_rows(TUNE_METHODS)}

full, lp_ft and layerwise write a model's folder; bitfit, mask and svf a patch file with the tensors that changed;
dora, ia3, ln, lokr, lora and mhr an adapter as PEFT has it, mhr also one for each data file in OUT/tasks. All are
inputs of merges. adamix, adapter_fusion, compacter, houlsby, parallel and pfeiffer write a file with a bottleneck
adapter, which `eval MODEL+FILE` runs; mixture and ptr a file, and the others a folder, that `eval --prompt` puts before
or around every text. MODEL is a folder, a name on the Hub, or MODEL+ADAPTER.

\b
Data are .jsonl with one of these on every line, .txt for lm, or .npz with the model's inputs and labels:
  lm              {{"text": ...}}, {{"prompt": ..., "completion": ...}} or {{"messages": [...]}}; of the last two
                  only completions, and what the assistant says, are learned. With --loss dpo=0.1
                  {{"prompt": ..., "chosen": ..., "rejected": ...}}
  classification  {{"text": ..., "label": 0}}; {{"image": "a.png", "label": 0}}, with paths relative to the file,
                  or a folder with a sub-folder of images for each class
  embedding       {{"text": ..., "positive": ...}}, for a sentence encoder
  masked_lm       {{"text": ...}} or .txt; 15 % of the tokens, chosen anew in each step, are predicted
  seq2seq         {{"prompt": ..., "completion": ...}}, for an encoder with a decoder
  regression      {{"text": ..., "label": 0.37}}, for a head with one output

\b
Terms of --loss, each with a number, as --loss l2sp=0.01:
{_terms()}

Under torchrun several processes share the examples of each step.

A run that was interrupted goes on from OUT.training when the same command runs again; metrics.jsonl there has a
line for each step. If OUT holds the result of the same request already, nothing is done. Needs the extra:
pip install "mergekit_lfm[models]", and for adapters and prompts "mergekit_lfm[tune]"
"""


def _read_terms(ctx: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, float]:  # noqa: ARG001
    terms = dict[str, float]()
    for text in texts:
        name, _, number = text.partition("=")
        try:
            terms[name.strip()] = float(number)
        except ValueError:
            raise click.BadParameter(f"found {text!r}; expected a name and a number, as l2sp=0.01") from None
    return terms


def _read_dev(ctx: click.Context, parameter: click.Parameter, text: str | None) -> str | float | None:  # noqa: ARG001
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _read_groups(
    ctx: click.Context,  # noqa: ARG001
    parameter: click.Parameter,  # noqa: ARG001
    texts: tuple[str, ...],
) -> list[dict[str, str | float]]:
    groups = list[dict[str, str | float]]()
    for text in texts:
        match, *settings = text.split()
        pairs = [setting.partition("=") for setting in settings]
        try:
            groups.append({"match": match, **{name: float(number) for name, _, number in pairs}})
        except ValueError:
            expected = "a pattern, then learning_rate=NUMBER, weight_decay=NUMBER or both"
            raise click.BadParameter(f"found {text!r}; expected {expected}") from None
    return groups


@click.command(
    cls=Command,
    help=HELP,
    epilog="""\b
Examples:
  mergekit-lfm tune models/base --data a.jsonl --task lm -o tuned
  mergekit-lfm tune models/base --data a.jsonl --task lm --method lora --rank 16 -o tuned-lora
  mergekit-lfm tune models/base --data a.jsonl --dev b.jsonl --task lm --evaluate-every 50 --patience 3 -o tuned""",
)
@click.argument("model")
@click.option(
    "--data",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="A data file: .jsonl, .txt or .npz; a folder of images; or package.module:function, which is called and "
    "returns such lines. Can be given several times.",
)
@click.option(
    "--task",
    required=True,
    type=click.Choice([*TUNE_TASKS]),
    help="The kind of model, and the loss; see above.",
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder or file to write.")
@method_option(TUNE_METHODS, "full", "The part that is trained, and how.")
@parameter_options(TUNE_METHODS)
@click.option(
    "--loss",
    multiple=True,
    callback=_read_terms,
    metavar="NAME=NUMBER",
    help=f"Add a term to the loss: {', '.join(LOSS_TERMS)}. Can be given several times.",
)
@click.option(
    "--dev",
    callback=_read_dev,
    metavar="FILE|SHARE",
    help="A data file, or a share of --data, as 0.1; the state with the least loss on it stays.",
)
@click.option("--stats", type=click.Path(path_type=Path), help="For mask: a file of `stats fisher`.")
@click.option(
    "--train",
    multiple=True,
    metavar="PATTERN",
    help="Train, of what the method trains, parameters alone whose names match, such as '*layers.0.*'. Can be given "
    "several times.",
)
@click.option(
    "--window",
    type=click.IntRange(min=1),
    help="The most tokens of an example. [default: as many as the model takes; for texts of lm at most 512]",
)
@click.option("--steps", type=click.IntRange(min=1), default=200, help="Steps of the optimizer, AdamW. [default: 200]")
@options.batch_size_option("a step")
@click.option("--accumulate", type=click.IntRange(min=1), default=1, help="Cut each batch into this many parts.")
@click.option(
    "--learning-rate", type=click.FloatRange(0, min_open=True), help="[default: the method's, as `methods NAME` shows]"
)
@click.option(
    "--schedule",
    type=click.Choice(SCHEDULES),
    default="linear",
    help="How the learning rate falls after the warm-up. [default: linear]",
)
@click.option("--warmup", type=click.FloatRange(0, 1), default=0.0, help="Share of the steps with a rising rate.")
@click.option("--weight-decay", type=click.FloatRange(0), default=0.0, help="Weight decay of matrices. [default: 0]")
@click.option(
    "--group",
    "groups",
    multiple=True,
    callback=_read_groups,
    metavar="TEXT",
    help='Parameters with settings of their own: "*.layers.0.* learning_rate=1e-5 weight_decay=0". Several times.',
)
@click.option("--clip", type=click.FloatRange(0), default=1.0, help="Largest norm of the gradient, 0 for any.")
@click.option("--evaluate-every", type=click.IntRange(min=1), help="Steps between two looks at --dev. [default: all]")
@click.option(
    "--patience", type=click.IntRange(min=1), help="Stop after this many looks at --dev without a better loss."
)
@click.option("--checkpointing", is_flag=True, help="Compute activations again to save memory.")
@click.option("--autocast", is_flag=True, help="Multiply matrices in bfloat16, which is faster on a GPU.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Decides all random numbers. [default: 0]")
@options.device_option("Where the model runs", default=None)
@click.option("--threads", type=click.IntRange(min=1), help="The number of threads. [default: torch's choice]")
@options.overwrite
@options.output
@click.pass_obj
def tune(console: Console, /, model: str, data: tuple[Path, ...], method: str, out: Path, **values: Any) -> None:
    """Train a model; the text is HELP."""
    from mergekit_lfm.api.tune import tune_model
    from mergekit_lfm.commands.show.tunings import done_data, done_text

    own = {parameter.name for each in TUNE_METHODS.values() for parameter in each.parameters}
    parameters = {name: values.pop(name) for name in own}
    parameters = {name: value for name, value in parameters.items() if value is not None}
    values["train"] = values["train"] or None
    with going_on_later(out):
        values |= {"method": method, "parameters": parameters, "progress": console.progress}
        outcome = tune_model(model, data, out, **values)
    if rank():
        return  # the first of several processes prints
    console.warn(outcome.warnings)
    console.conclude(done_data(outcome), lambda: done_text(outcome), path=out)
