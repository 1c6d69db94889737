"""`evaluate_models`, `measure_barrier` and `repair_model`: judging and mending models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from mergekit_lfm.api.arguments import StrPath, expand, model_folder
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.runtime.tasks import TUNE_TASKS
from mergekit_lfm.store.elsewhere import shown_name

if TYPE_CHECKING:
    from torch import nn

    from mergekit_lfm.artifacts.attachment import Attachment
    from mergekit_lfm.artifacts.prompt import Prompt
    from mergekit_lfm.artifacts.transform import Transform
    from mergekit_lfm.edit.scores import FactScores
    from mergekit_lfm.judge.barrier import Interpolation
    from mergekit_lfm.judge.evaluate import Score
    from mergekit_lfm.judge.held_out import Fit, TokenLoss
    from mergekit_lfm.repair import Repaired
    from mergekit_lfm.runtime.load import Loaded


Scores = Mapping[str, Mapping[str, "Score | TokenLoss | Fit | FactScores"]]  # by model, then by file


def evaluate_models(
    models: StrPath | Sequence[StrPath],
    *,
    text: StrPath | Sequence[StrPath] = (),
    data: StrPath | Sequence[StrPath] = (),
    facts: StrPath | None = None,
    task: str | None = None,
    prompt: StrPath | None = None,
    window: int | None = None,
    stride: int | None = None,
    device: str = "cpu",
    progress: Progress = SILENCE,
) -> Outcome[Scores]:
    """Judge saved models on texts, on data files of a task, or on a facts file; one model is in memory at a time.

    models: folders, names on the Hub, or MODEL+ADAPTER, where the adapter may be a file with a bottleneck adapter.
    text: files of UTF-8 text, for language models: perplexity and bits per byte. data: .jsonl, .txt or .npz files of
    `task`: "lm" as for texts, with images the perplexity of answers, "classification" the accuracy, "embedding" the
    retrieval of each text's own positive, "seq2seq" the perplexity of answers, "masked_lm" that of masked tokens,
    "regression" the mean squared error.
    facts: a facts file, as `edit_model` takes it. prompt: a prompt's folder, as `tune_model` or PEFT makes it, or a
    file with a mixture of prompts; it stands before every text, and the same tokens are scored as without it. Or a file
    with a template by `ptr`, which makes classifiers of masked language models. window:
    the most tokens at a time; stride: for "lm", the tokens predicted at a time. The result has the scores by model,
    then by file.

    Raises PlanError for inputs that do not go together and files that cannot be read, ImportError if transformers is
    not installed, or with a prompt peft.
    """
    started = time.monotonic()
    named, texts, files = _as_list(models), _as_list(text), _as_list(data)
    if [bool(texts), bool(files), facts is not None].count(True) != 1:
        raise PlanError("give texts (--text), data with a task (--data, --task) or facts (--facts): one of the three")
    if files and task is None:
        raise PlanError(f"data need a task: {', '.join(TUNE_TASKS)}; give one (--task)")
    if texts and task not in (None, "lm"):
        raise PlanError(f"texts are for language models; give data with the task {task}")
    if facts is not None and (task, prompt, window, stride) != (None, None, None, None):
        raise PlanError("facts take no task, prompt, window or stride; leave them out")
    task = task or "lm"
    _check_stride(stride, task)
    from mergekit_lfm.api.attachments import load_attached

    judges: dict[str, Callable[[Loaded], Score | TokenLoss | Fit | FactScores]]
    if facts is not None:
        judges = {str(facts): _judge_facts(expand(facts, "facts"), progress)}
    else:
        judges = {str(file): _judge_text(expand(file, "text"), window, stride) for file in texts}
        judges |= {str(file): judge_data(expand(file, "data"), task, window, stride) for file in files}
    before = None if prompt is None else _open_prompt(prompt)
    scores, notices = {}, list[str]()
    for model in named:
        folder = model_folder(model)
        loaded = load_attached(folder, _task_before(before, task), device=device)
        if before is not None:
            loaded, notice = _put_before(loaded, before, shown_name(str(model), folder))
            notices += notice
        scores[shown_name(str(model), folder)] = {name: judge(loaded) for name, judge in judges.items()}
        del loaded
    return Outcome(None, scores, warnings=warn_of(notices), seconds=time.monotonic() - started)


def _check_stride(stride: int | None, task: str) -> None:
    """Raise PlanError for a stride that the task does not have."""
    if stride is not None and task != "lm":
        raise PlanError("stride is for language models; leave it out")


def _open_prompt(prompt: StrPath) -> Prompt | Attachment:
    """The prompt in a folder, or the mixture in a file."""
    from mergekit_lfm.artifacts.attachment import open_attachment
    from mergekit_lfm.artifacts.prompt import open_prompt

    place = expand(prompt, "prompt")
    return open_attachment(place) if place.is_file() else open_prompt(place, str(prompt))


def _put_before(loaded: Loaded, prompt: Prompt | Attachment, model: str) -> tuple[Loaded, list[str]]:
    """The loaded model with the prompt, and a notice if that was trained on another one."""
    from mergekit_lfm.artifacts.prompt import Prompt
    from mergekit_lfm.runtime.prompts import with_prompt
    from mergekit_lfm.runtime.templates import with_template

    base = prompt.base if isinstance(prompt, Prompt) else prompt.info.base
    other = base not in (None, loaded.checkpoint.content)
    notice = f"the prompt was trained on a model of other content than {model}; the score is of both together"
    notices = [notice] if other else []
    if _is_template(prompt):
        return with_template(loaded, prompt), notices
    return with_prompt(loaded, prompt), notices


def _is_template(prompt: Prompt | Attachment | None) -> TypeGuard[Attachment]:
    """Whether a prompt is a template, which makes a classifier of a masked language model."""
    from mergekit_lfm.artifacts.attachment import TEMPLATE, Attachment

    return isinstance(prompt, Attachment) and prompt.info.form == TEMPLATE


def _task_before(prompt: Prompt | Attachment | None, task: str) -> str:
    """The task for which a model is loaded that is judged behind a prompt. Raises PlanError for a template's other."""
    if not _is_template(prompt):
        return task
    if task != "classification":
        raise PlanError(f"found a template for {task}, expected classification; give that task (--task)")
    return "masked_lm"


def _as_list(paths: StrPath | Sequence[StrPath]) -> list[StrPath]:
    return [paths] if isinstance(paths, str | PathLike) else list(paths)


def _judge_facts(file: Path, progress: Progress) -> Callable[[Loaded], FactScores]:
    from mergekit_lfm.api.efficacy import score
    from mergekit_lfm.artifacts.facts import read_facts_file

    return partial(score, facts=read_facts_file(file), doing="judging", progress=progress)


def _judge_text(file: Path, window: int | None, stride: int | None) -> Callable[[Loaded], Score]:
    from mergekit_lfm.judge.evaluate import perplexity
    from mergekit_lfm.store.files import read_text

    try:
        text = read_text(file, most=None)
    except UnicodeDecodeError as error:
        raise PlanError(f"{file}: {error}; expected UTF-8 text") from None
    return partial(perplexity, text=text, window=window, stride=stride)


def judge_data(
    file: Path, task: str, window: int | None, stride: int | None
) -> Callable[[Loaded], Score | TokenLoss | Fit]:
    """The function that scores a loaded model on a data file of its task. Raises FormatError for a damaged file."""
    from mergekit_lfm.judge.evaluate import accuracy, perplexity, retrieval
    from mergekit_lfm.judge.held_out import fit_of, token_loss
    from mergekit_lfm.runtime.data import read_documents
    from mergekit_lfm.runtime.images import has_images
    from mergekit_lfm.runtime.lines import has_answers

    if task == "lm" and (has_images(file) or has_answers(file)):
        if stride is not None:
            raise PlanError(f"{file}: stride is for texts, and these are answers; leave it out")
        return partial(token_loss, data=file, window=window)
    if task == "lm":
        return partial(perplexity, text=read_documents(file), window=window, stride=stride)
    if task == "classification":
        return partial(accuracy, data=file, window=window)
    if task == "embedding":
        return partial(retrieval, pairs=file, window=window)
    if task in ("masked_lm", "seq2seq"):
        return partial(token_loss, data=file, window=window)
    if task == "regression":
        return partial(fit_of, data=file, window=window)
    raise PlanError(f"found the task {task!r}, expected {', '.join(TUNE_TASKS)}; choose one of these")


def measure_barrier(
    first: StrPath | Loaded | nn.Module,
    second: StrPath | Loaded | nn.Module,
    data: StrPath | Iterable[Any],
    *,
    task: str = "lm",
    points: int = 11,
    align: StrPath | Transform | None = None,
    reset_batchnorm: StrPath | Iterable[Any] | None = None,
    window: int | None = None,
    batch_size: int = 16,
    device: str = "cpu",
    progress: Progress = SILENCE,
) -> Outcome[Interpolation]:
    """Judge the models on the straight line between two models: how much worse than its ends is the middle?

    first, second: folders, models on the Hub, loaded models, or modules that return logits. data: a file of the task
    ("lm" or "classification"; plain text for "lm"), or batches. points: how many models, the ends too. align: a
    transform that rewrites the second model before. reset_batchnorm: data to estimate BatchNorm's running statistics
    on, between the ends. Raises PlanError if no line joins the two models, and for data without labels.
    """
    from mergekit_lfm.judge.barrier import barrier

    started = time.monotonic()
    one, other = (model_folder(x) if isinstance(x, str | PathLike) else x for x in (first, second))
    with progress.by_count("points", "judging") as count:
        line = barrier(
            one,
            other,
            _as_data(data),
            task=task,
            points=points,
            transform=expand(align, "align") if isinstance(align, str | PathLike) else align,
            reset_batchnorm=None if reset_batchnorm is None else _as_data(reset_batchnorm),
            window=window,
            batch_size=batch_size,
            device=device,
            progress=count,
        )
    return Outcome(None, line, seconds=time.monotonic() - started)


def _as_data(data: StrPath | Iterable[Any]) -> Path | Iterable[Any]:
    return expand(data, "data") if isinstance(data, str | PathLike) else data


def repair_model(
    merged: StrPath,
    ends: tuple[StrPath, StrPath],
    data: StrPath | Iterable[Any],
    out: StrPath,
    *,
    task: str,
    weights: tuple[float, float] = (0.5, 0.5),
    align: StrPath | Transform | None = None,
    window: int | None = None,
    batch_size: int = 16,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = SILENCE,
) -> Outcome[Repaired]:
    """Give a merged model's hidden units the mean and spread that they have in the two models that were merged.

    merged, ends: folders, or models on the Hub. data: a file of the task, or batches; labels are not needed. out: the
    folder to write. weights: how much of each end the merged model has. align: the transform that rewrote the second
    end before the merge. The outcome's digest is that of the new model's content. Raises PlanError if there is nothing
    to repair, and if `out` exists without `overwrite`; FormatError if the merged model lacks running statistics.
    """
    from mergekit_lfm.repair import repair
    from mergekit_lfm.store.checkpoint import open_checkpoint

    started, folder = time.monotonic(), expand(out)
    one, other = map(model_folder, ends)
    with progress.by_count("examples", "repairing") as count:
        repaired = repair(
            model_folder(merged),
            (one, other),
            _as_data(data),
            folder,
            task=task,
            weights=weights,
            transform=expand(align, "align") if isinstance(align, str | PathLike) else align,
            window=window,
            batch_size=batch_size,
            device=device,
            overwrite=overwrite,
            progress=count,
        )
    return Outcome(folder, repaired, open_checkpoint(folder).content, seconds=time.monotonic() - started)
