"""`eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.console import Console
from mergekit_lfm.commands.shell import Command, ModelFolder
from mergekit_lfm.runtime.tasks import TUNE_TASKS


@click.command(
    "eval",
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm eval merged/quickstart --text news.txt
  mergekit-lfm eval base merged/quickstart --text a.txt --text b.txt
  mergekit-lfm eval merged/digits --data test.npz --task classification
  mergekit-lfm eval merged/minilm --data pairs.jsonl --task embedding
  mergekit-lfm eval models/base --prompt docs-prompt --text news.txt
  mergekit-lfm eval models/a models/a+bottleneck.safetensors --data test.jsonl --task classification
  mergekit-lfm eval models/a models/a-edited --facts facts.yaml
  mergekit-lfm eval average --expert a=a.jsonl --expert b=b.jsonl --data test.jsonl --task lm""",
)
@click.argument("models", nargs=-1, type=ModelFolder())
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A file of UTF-8 text, for language models. Can be given several times.",
)
@click.option(
    "--data",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A data file to judge on: .jsonl, .txt or .npz, or a folder of images. Can be given several times.",
)
@click.option(
    "--facts", type=click.Path(path_type=Path), help="A facts file, as `edit` takes it, to score language models on."
)
@click.option(
    "--expert",
    "experts",
    multiple=True,
    metavar="MODEL=FILE",
    help="Judge experts together, in a row `routed`: each text by the one whose own texts, in FILE, are most like it. "
    "Can be given several times, for one model, too.",
)
@click.option(
    "--router",
    type=ModelFolder(),
    help="A model of sentences that says which texts are alike, for --expert. [default: none; n-grams do]",
)
@click.option(
    "--task", type=click.Choice([*TUNE_TASKS]), help="The kind of models; see above. [default: lm, for --text]"
)
@click.option(
    "--prompt",
    type=click.Path(path_type=Path),
    help="The folder of a prompt, as `tune --method prompt` makes it, or a mixture's file, to put before every text; "
    "or a template's, as `tune --method ptr` makes it, to put around them.",
)
@click.option(
    "--window",
    type=click.IntRange(min=1),
    help="Cut the data into pieces of this many tokens. [default: as many as the model takes; for lm at most 2048]",
)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    help="For lm: the number of tokens predicted from each piece; fewer give more context, and take longer. "
    "[default: the window]",
)
@options.device_option("Where the models run")
@options.output
@click.pass_obj
def evaluate(
    console: Console,
    /,
    models: Sequence[Path],
    texts: Sequence[Path],
    files: Sequence[Path],
    facts: Path | None,
    experts: Sequence[str],
    router: Path | None,
    task: str | None,
    prompt: Path | None,
    window: int | None,
    stride: int | None,
    device: str,
) -> None:
    """Judge MODELS on texts, data or facts: folders, names on the Hub, MODEL+ADAPTER, or MODEL+FILE with a bottleneck.

    \b
    lm              perplexity and bits per byte of texts; less is better; of
                    lines with an "image" the perplexity of their answers
    classification  share of examples whose most likely class is their "label"
    embedding       share of texts whose own "positive" is the nearest of all
                    (top-1), and the mean of 1 / its place (MRR)
    seq2seq         perplexity of the "completion" after each "prompt"
    masked_lm       perplexity of 15 % of the tokens, the same for all models
    regression      mean squared error, and correlation with each "label"

    With --facts: ES, PS, NS are shares of prompts, paraphrases and other subjects where the right target is the more
    likely one; EA, PA, NA where its tokens are the most likely of all; GA and QA where the model's own words say the
    fact, after the prompt and when it is asked; SA and unedited are as EA, of other facts, about the same subjects and
    others.

    Bits per byte compare models with different tokenizers. Over several files the mean is the arithmetic one, of
    perplexities the geometric one. Data: lines {"text": ..., "label": 0} or {"text": ..., "positive": ...}, or arrays
    (.npz) named as the model's inputs, with "labels". Needs the extra: pip install "mergekit_lfm[models]"
    """
    from mergekit_lfm.api.judge import evaluate_models
    from mergekit_lfm.commands.show.evaluations import evaluation_data, evaluation_text, facts_data, facts_text

    routed = _read_experts(experts)
    _check_models(models, routed, router, texts)
    if facts is None:
        _check_files(texts, files, task, stride)
    elif routed or texts or files or (task, prompt, window, stride) != (None, None, None, None):
        raise click.UsageError(
            "--facts stands alone: leave out --expert, --text, --data, --task, --prompt, --window and --stride."
        )
    how: dict[str, Any] = {"task": task, "window": window, "stride": stride, "device": device}
    scores: dict[str, Any] = {}
    if models:
        given: dict[str, Any] = {"text": texts, "data": files, "facts": facts, "prompt": prompt}
        outcome = evaluate_models(models, **given, **how, progress=console.progress)
        console.warn(outcome.warnings)
        scores |= outcome.result
    data, text = (evaluation_data, evaluation_text) if facts is None else (facts_data, facts_text)
    if routed:
        _conclude_routed(console, scores, routed, files, {**how, "encoder": router})
    console.conclude({"models": data(scores)}, lambda: text(scores))


def _check_models(
    models: Sequence[Path], routed: Mapping[str, Sequence[Path]], router: Path | None, texts: Sequence[Path]
) -> None:
    """Raise a usage error for models and experts that do not go together."""
    if not models and not routed:
        raise click.UsageError("Give one model or more to judge, or --expert MODEL=FILE.")
    if router is not None and not routed:
        raise click.UsageError("--router chooses among experts; give --expert MODEL=FILE, too.")
    if routed and texts:
        raise click.UsageError("--expert chooses for each text of --data; give that in place of --text.")


def _conclude_routed(
    console: Console,
    scores: Mapping[str, Any],
    experts: Mapping[str, Sequence[Path]],
    files: Sequence[Path],
    how: Mapping[str, Any],
) -> NoReturn:
    """Judge experts together, and print their row below those of the models."""
    from mergekit_lfm.api.route import evaluate_routed
    from mergekit_lfm.commands.show.evaluations import choices_text, evaluation_data, evaluation_text

    routed = evaluate_routed(experts, files, **how).result
    every = {**scores, "routed": routed.scores}
    data = {"models": evaluation_data(every), "chosen": {name: dict(own) for name, own in routed.chosen.items()}}
    console.conclude(data, lambda: f"{evaluation_text(every)}\n{choices_text(routed.chosen)}")


def _read_experts(given: Sequence[str]) -> dict[str, list[Path]]:
    """The files of each expert; a usage error for another text than MODEL=FILE."""
    experts: dict[str, list[Path]] = {}
    for text in given:
        model, equals, file = text.rpartition("=")
        if not (model and equals and file):
            raise click.UsageError(f"--expert is {text!r}; expected MODEL=FILE, an expert and its kind of texts.")
        experts.setdefault(model, []).append(Path(file))
    return experts


def _check_files(texts: Sequence[Path], files: Sequence[Path], task: str | None, stride: int | None) -> None:
    """Raise a usage error for files and options that do not go together."""
    if bool(texts) == bool(files):
        raise click.UsageError("Give --text FILE, or --data FILE with --task, or --facts FILE.")
    if files and task is None:
        raise click.UsageError("Give --task with --data: what do the models do with it?")
    if texts and task not in (None, "lm"):
        raise click.UsageError(f"--text is for language models; give --data with --task {task}.")
    if stride is not None and task not in (None, "lm"):
        raise click.UsageError("--stride is for language models.")
