"""`tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.options import going_on_later
from mergekit_lfm.commands.parameters import method_option, method_rows, parameter_options
from mergekit_lfm.commands.shell import Command
from mergekit_lfm.commands.training import data_options, loss_option, training_options
from mergekit_lfm.machine.launch import rank
from mergekit_lfm.recipe.loss_terms import LOSS_TERMS
from mergekit_lfm.recipe.registry import TUNE_METHODS


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
                  {{"prompt": ..., "chosen": ..., "rejected": ...}}. With "image": "a.png", or a list, beside
                  prompt or messages for a model of images and texts, such as LLaVA
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
@data_options
@method_option(TUNE_METHODS, "full", "The part that is trained, and how.")
@parameter_options(TUNE_METHODS)
@loss_option(LOSS_TERMS, "Add a term to the loss")
@training_options
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
