"""Questions for comparing models: batches, with the right class or token for each prediction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.errors import PlanError
from mergekit_lfm.judge.evaluate import LM_WINDOW, pieces
from mergekit_lfm.judge.evaluate import window_and_stride as window_and_stride
from mergekit_lfm.runtime.batches import Batch, as_batches
from mergekit_lfm.runtime.data import read_data, read_documents
from mergekit_lfm.runtime.load import Loaded, logits, start_token, tokenizer_for_texts
from mergekit_lfm.runtime.probe import forward

QUESTION_TASKS = ("lm", "classification")
IGNORE_INDEX = -100  # a target that no prediction is wanted for

Data = str | Path | Iterable[Any]


@dataclass(frozen=True, eq=False)
class Question:
    """A batch with the right class for each row of scores, int64 [n], or [n, tokens] for a language model.

    IGNORED marks rows without a wanted prediction.
    """

    batch: Batch
    targets: Tensor

    @cached_property
    def asked(self) -> int:
        """The number of predictions."""
        return int((self.targets != IGNORE_INDEX).sum())


def judge(module: nn.Module, questions: Sequence[Question]) -> tuple[float, float]:
    """The mean cross entropy in nats, and the share of targets with the highest score; the first wins a tie.

    NaN scores count as wrong. Raises PlanError for scores that do not fit the targets.
    """
    total, right = 0.0, 0
    for question in questions:
        with torch.inference_mode():
            scores = logits(forward(module, question.batch))
            targets = question.targets.to(scores.device)
            _check_scores(scores, targets)
            here = targets != IGNORE_INDEX
            rows, classes = scores[here].float(), targets[here]  # [asked, classes], [asked]
            total += float(nn.functional.cross_entropy(rows, classes, reduction="none").double().sum())
            right += int(((rows.argmax(1) == classes) & ~rows.isnan().any(1)).sum())
    count = sum(question.asked for question in questions)
    return total / count, right / count


def _check_scores(scores: Tensor, targets: Tensor) -> None:
    least, most = int(targets[targets != IGNORE_INDEX].min()), int(targets.max())
    if scores.shape[:-1] != targets.shape or most >= scores.shape[-1] or least < 0:
        raise PlanError(
            f"the model gives scores {list(scores.shape)}, the data have {list(targets.shape)} classes from {least} "
            f"to {most}; expected a row of scores for each, over all classes. Give data that the models were made for"
        )


def batches_of(
    model: Loaded | nn.Module, data: Data, task: str, *, window: int | None, batch_size: int
) -> Sequence[Batch]:
    """The batches in data: a file for `read_data`, or any input of `as_batches`."""
    if not isinstance(data, str | Path):
        return as_batches(data)
    tokenizer, positions = (model.tokenizer, model.positions) if isinstance(model, Loaded) else (None, None)
    return read_data(data, task, tokenizer, window=window, positions=positions, batch_size=batch_size)


def questions_of(
    model: Loaded | nn.Module, data: Data, task: str, *, window: int | None, batch_size: int
) -> list[Question]:
    """The data with the right answers: labels, or next tokens for "lm", in a text those that `perplexity` predicts.

    Raises PlanError for data without labels, or with nothing to predict.
    """
    if task == "lm" and isinstance(data, str | Path) and Path(data).suffix != ".npz":
        return _of_texts(model, Path(data), window, batch_size)
    batches = batches_of(model, data, task, window=window, batch_size=batch_size)
    questions = [Question(batch, (_next_tokens if task == "lm" else _labels)(batch)) for batch in batches]
    if not any(question.asked for question in questions):
        raise PlanError("the data hold nothing to predict; expected sequences of at least two tokens. Give some")
    return [question for question in questions if question.asked]


def _labels(batch: Batch) -> Tensor:
    if batch.labels is None:
        raise PlanError("the data have no labels; expected one for each example. Give data with labels")
    return batch.labels


def _next_tokens(batch: Batch) -> Tensor:
    """The token after each, [n, tokens]; IGNORED for the last ones."""
    ids = batch.kwargs.get("input_ids", next(iter(batch.args), None))
    if ids is None or ids.ndim != 2 or ids.is_floating_point():
        raise PlanError("the data are not token sequences; expected whole numbers [examples, tokens] as input_ids")
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE_INDEX)], dim=1).long()


def _of_texts(model: Loaded | nn.Module, path: Path, window: int | None, batch_size: int) -> list[Question]:
    """The pieces in which `perplexity` predicts the documents in a file, in batches of equal length."""
    if not isinstance(model, Loaded):
        raise PlanError(f"{path} holds texts, but a module has no tokenizer; give batches of tokens, or a model folder")
    window, stride = window_and_stride(model, window, None)
    tokenizer = tokenizer_for_texts(model.tokenizer)
    by_length: dict[int, list[tuple[list[int], list[int]]]] = {}
    for document in read_documents(path):
        tokens = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [start_token(tokenizer), *tokens]
        for begin, first, end in pieces(len(tokens), window, stride):
            targets = [IGNORE_INDEX] * (first - begin) + tokens[first:end]
            by_length.setdefault(end - begin, []).append((ids[begin:end], targets))
    if not by_length:
        raise PlanError(f"{path}: the text is empty: there is nothing to predict; give a text of at least one token")
    questions, start = list[Question](), 0
    for length, rows in sorted(by_length.items()):
        size = max(1, min(batch_size, LM_WINDOW // length))  # at most the scores of the longest window
        for chunk in (rows[i : i + size] for i in range(0, len(rows), size)):
            inputs, right = (torch.tensor(side) for side in zip(*chunk, strict=True))
            batch = Batch(tuple(range(start, start + len(chunk))), kwargs={"input_ids": inputs})
            questions.append(Question(batch, right))
            start += len(chunk)
    return questions
