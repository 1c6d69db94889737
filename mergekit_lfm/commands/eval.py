"""`eval`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_lfm.commands.options import TASKS, as_json, needing_models
from mergekit_lfm.commands.shell import Command, ModelFolder
from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.hub import display_name

if TYPE_CHECKING:
    from mergekit_lfm.judge.evaluate import Score
    from mergekit_lfm.runtime.load import Loaded

Judge = Callable[["Loaded"], "Score"]


@click.command(
    "eval",
    cls=Command,
    epilog="""\b
Examples:
  mergekit-lfm eval merged/quickstart --text news.txt
  mergekit-lfm eval base merged/quickstart --text a.txt --text b.txt
  mergekit-lfm eval merged/digits --data test.npz --task classification
  mergekit-lfm eval merged/minilm --data pairs.jsonl --task embedding
  mergekit-lfm eval models/a models/a-edited --facts facts.yaml""",
)
@click.argument("models", nargs=-1, required=True, type=ModelFolder())
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
    help="A data file of the task: .jsonl, .txt or .npz. Can be given several times.",
)
@click.option("--facts", type=click.Path(path_type=Path), help="A facts file as `edit` takes it, for language models.")
@click.option("--task", type=click.Choice(TASKS), help="What the models do with --data. [default: lm, for --text]")
@click.option(
    "--window", type=click.IntRange(min=1), help="Most tokens at a time. [default: the model's; for lm at most 2048]"
)
@click.option("--stride", type=click.IntRange(min=1), help="For lm: tokens predicted at a time. [default: the window]")
@click.option("--device", default="cpu", help="Where the models run: cpu, cuda, cuda:1, auto. [default: cpu]")
@as_json
def evaluate(
    models: Sequence[Path],
    texts: Sequence[Path],
    files: Sequence[Path],
    facts: Path | None,
    task: str | None,
    window: int | None,
    stride: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Judge MODELS on texts, data or facts.

    \b
    lm              perplexity and bits per byte of texts; less is better
    classification  share of examples whose most likely class is their "label"
    embedding       share of texts whose own "positive" is the nearest of all
                    (top-1), and the mean of 1 / its place (MRR)

    With --facts: ES, PS, NS are shares of prompts, paraphrases and other subjects where the right target is the more
    likely one; EA, PA, NA where its tokens are the most likely of all; SA and unedited the same of other facts, about
    the same subjects and others.

    Bits per byte compare models with different tokenizers. Over several files the mean is the arithmetic one, of
    perplexities the geometric one. Data: lines {"text": ..., "label": 0} or {"text": ..., "positive": ...}, or arrays
    (.npz) named as the model's inputs, with "labels". Needs the extra: pip install "mergekit_lfm[models]"
    """
    from mergekit_lfm.commands.show.evaluations import evaluation_data, evaluation_text

    if facts is not None:
        if texts or files or (task, window, stride) != (None, None, None):
            raise click.UsageError("--facts stands alone: leave out --text, --data, --task, --window and --stride.")
        _judge_facts(models, facts, device, as_json)
        return
    if bool(texts) == bool(files):
        raise click.UsageError("Give --text FILE, or --data FILE with --task, or --facts FILE.")
    if files and task is None:
        raise click.UsageError("Give --task with --data: what do the models do with it?")
    if texts and task not in (None, "lm"):
        raise click.UsageError(f"--text is for language models; give --data with --task {task}.")
    task = task or "lm"
    if stride is not None and task != "lm":
        raise click.UsageError("--stride is for language models.")
    judges = {str(path): _judge_of_text(path, window, stride) for path in texts}
    judges |= {str(path): _judge_of_data(path, task, window, stride) for path in files}
    scores = _scores(models, task, judges, device)
    click.echo(json.dumps(evaluation_data(scores)) if as_json else evaluation_text(scores))


def _judge_facts(models: Sequence[Path], path: Path, device: str, as_json: bool) -> None:
    """Print every model's scores on the facts, one model in memory at a time."""
    from mergekit_lfm.artifacts.facts import read_facts_file
    from mergekit_lfm.commands import checks
    from mergekit_lfm.commands.show.patches import counts_text, scores_text

    facts = read_facts_file(path)
    scores = {}
    for model in models:
        loaded = checks.load(model, "float32", device)
        scores[display_name(model)] = checks.score(loaded, facts, "judging", hidden=as_json).as_data()
    if as_json:
        click.echo(json.dumps([{"model": model, "facts": str(path), **found} for model, found in scores.items()]))
    else:
        click.echo(f"{scores_text(scores)}\n{counts_text(next(iter(scores.values())))}")


def _judge_of_text(path: Path, window: int | None, stride: int | None) -> Judge:
    from mergekit_lfm.judge.evaluate import perplexity

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: {error}; expected UTF-8 text") from None
    return partial(perplexity, text=text, window=window, stride=stride)


def _judge_of_data(path: Path, task: str, window: int | None, stride: int | None) -> Judge:
    from mergekit_lfm.judge.evaluate import accuracy, perplexity, retrieval
    from mergekit_lfm.runtime.data import read_documents

    if task == "lm":
        return partial(perplexity, text=read_documents(path), window=window, stride=stride)
    if task == "classification":
        return partial(accuracy, data=path, window=window)
    return partial(retrieval, pairs=path, window=window)


def _scores(models: Sequence[Path], task: str, judges: dict[str, Judge], device: str) -> dict[str, dict[str, Score]]:
    """Every model's score on every file, one model in memory at a time."""
    from mergekit_lfm.runtime.load import load_model

    scores = {}
    for path in models:
        with needing_models():
            model = load_model(path, task, device=device)
        scores[display_name(path)] = {name: judge(model) for name, judge in judges.items()}
    return scores
