"""What models are asked when they are compared: batches, and which class or which token is right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.errors import PlanError
from mergekit_lfm.judge.evaluate import LONGEST_DEFAULT_WINDOW, pieces
from mergekit_lfm.judge.evaluate import extent as extent
from mergekit_lfm.runtime.batches import Batch, as_batches
from mergekit_lfm.runtime.data import read_data, read_documents
from mergekit_lfm.runtime.load import Loaded, logits, start_token, tokenizer_for_texts
from mergekit_lfm.runtime.probe import forward

TASKS = ("lm", "classification")
IGNORED = -100  # a target where nothing is asked

Data = str | Path | Iterable[Any]


@dataclass(frozen=True, eq=False)
class Question:
    """A batch with the right class for each row of scores, int64 [n] or, of a language model, [n, tokens].

    Where nothing is asked stands IGNORED.
    """

    batch: Batch
    targets: Tensor

    @cached_property
    def asked(self) -> int:
        """How many predictions it takes."""
        return int((self.targets != IGNORED).sum())


def judge(module: nn.Module, questions: Sequence[Question]) -> tuple[float, float]:
    """The mean cross entropy in nats, and the share of targets with the highest score; of equal ones the first counts.

    Scores that are NaN are wrong. PlanError for scores that do not fit the targets.
    """
    total, right = 0.0, 0
    for question in questions:
        with torch.inference_mode():
            scores = logits(forward(module, question.batch))
            targets = question.targets.to(scores.device)
            _check_scores(scores, targets)
            here = targets != IGNORED
            rows, classes = scores[here].float(), targets[here]  # [asked, classes], [asked]
            total += float(nn.functional.cross_entropy(rows, classes, reduction="none").double().sum())
            right += int(((rows.argmax(1) == classes) & ~rows.isnan().any(1)).sum())
    count = sum(question.asked for question in questions)
    return total / count, right / count


def _check_scores(scores: Tensor, targets: Tensor) -> None:
    least, most = int(targets[targets != IGNORED].min()), int(targets.max())
    if scores.shape[:-1] != targets.shape or most >= scores.shape[-1] or least < 0:
        raise PlanError(
            f"the model gives scores {list(scores.shape)}, asked for are {list(targets.shape)} classes from {least} "
            f"to {most}; expected a row of scores for each, over all classes. Give the data that the models are for"
        )


def batches_of(
    model: Loaded | nn.Module, data: Data, task: str, *, window: int | None, batch_size: int
) -> Sequence[Batch]:
    """The batches in data: a file for `read_data`, or what `as_batches` takes."""
    if not isinstance(data, str | Path):
        return as_batches(data)
    tokenizer, positions = (model.tokenizer, model.positions) if isinstance(model, Loaded) else (None, None)
    return read_data(data, task, tokenizer, window=window, positions=positions, batch_size=batch_size)


def questions_of(
    model: Loaded | nn.Module, data: Data, task: str, *, window: int | None, batch_size: int
) -> list[Question]:
    """The data with what is right: labels, or for "lm" the next token of each, of a text as `perplexity` predicts it.

    PlanError for data without labels, or with nothing to predict.
    """
    if task == "lm" and isinstance(data, str | Path) and Path(data).suffix != ".npz":
        return _of_texts(model, Path(data), window, batch_size)
    batches = batches_of(model, data, task, window=window, batch_size=batch_size)
    found = [Question(batch, (_following if task == "lm" else _labels)(batch)) for batch in batches]
    if not any(question.asked for question in found):
        raise PlanError("the data hold nothing to predict; expected sequences of at least two tokens. Give some")
    return [question for question in found if question.asked]


def _labels(batch: Batch) -> Tensor:
    if batch.labels is None:
        raise PlanError("the data have no labels; expected one for each example. Give data with labels")
    return batch.labels


def _following(batch: Batch) -> Tensor:
    """The next token of each, [n, tokens]; IGNORED for the last ones."""
    ids = batch.kwargs.get("input_ids", next(iter(batch.args), None))
    if ids is None or ids.ndim != 2 or ids.is_floating_point():
        raise PlanError("the data are no sequences of tokens; expected whole numbers [examples, tokens] as input_ids")
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1).long()


def _of_texts(model: Loaded | nn.Module, path: Path, window: int | None, batch_size: int) -> list[Question]:
    """The pieces in which `perplexity` predicts the documents in a file, those of equal length in batches."""
    if not isinstance(model, Loaded):
        raise PlanError(f"{path} holds texts, and a module has no tokenizer; give batches of tokens, or a folder")
    window, stride = extent(model, window, None)
    tokenizer = tokenizer_for_texts(model.tokenizer)
    by_length: dict[int, list[tuple[list[int], list[int]]]] = {}
    for document in read_documents(path):
        tokens = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [start_token(tokenizer), *tokens]
        for begin, first, end in pieces(len(tokens), window, stride):
            asked = [IGNORED] * (first - begin) + tokens[first:end]
            by_length.setdefault(end - begin, []).append((ids[begin:end], asked))
    if not by_length:
        raise PlanError(f"{path}: the text is empty: there is nothing to predict; give a text of at least one token")
    found, start = list[Question](), 0
    for length, rows in sorted(by_length.items()):
        size = max(1, min(batch_size, LONGEST_DEFAULT_WINDOW // length))  # no more scores than of the longest window
        for some in (rows[i : i + size] for i in range(0, len(rows), size)):
            inputs, targets = (torch.tensor(side) for side in zip(*some, strict=True))
            batch = Batch(tuple(range(start, start + len(some))), kwargs={"input_ids": inputs})
            found.append(Question(batch, targets))
            start += len(some)
    return found
