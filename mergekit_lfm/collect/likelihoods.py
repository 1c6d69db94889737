"""The scores of an example: scalars whose squared gradients add up to its share of the diagonal Fisher information.

For labels y drawn from the model itself, F = E_y (d log p(y | x) / d theta)^2. The expectation is exact, or y is
drawn. Draws depend only on the seed and the example's number in the data, not on batches or their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_lfm.collect.request import StatisticsRequest
from mergekit_lfm.errors import PlanError
from mergekit_lfm.kernels.random import key
from mergekit_lfm.methods.method import Value
from mergekit_lfm.runtime.load import embeddings, logits

if TYPE_CHECKING:
    from mergekit_lfm.runtime.batches import Batch

LABELS = {
    "classification": ("expected", "sampled", "true"),
    "lm": ("sampled", "true"),
    "embedding": ("sampled", "expected"),
}
SHAPES = {"classification": "[examples, classes]", "lm": "[examples, tokens, vocabulary]"}
# Each item holds one score for every example of a batch, [n]
LikelihoodScores = Callable[[Any, "Batch"], Iterator[Tensor]]


def resolve_labels(task: str, labels: Value) -> str:
    """The labels to use for a task, by default its first. Raises PlanError if the task does not have `labels`."""
    if labels is not None and labels not in LABELS[task]:
        reasons = {"lm": ": one backward pass for every entry of the vocabulary, at every position", "embedding": ""}
        why = reasons.get(task, "") if labels == "expected" else ""
        raise PlanError(f"{task} cannot have {labels!r} labels{why}; choose one of {', '.join(LABELS[task])}")
    return str(labels or LABELS[task][0])


def outcome(task: str, output: Any) -> Tensor:
    """The parameters of the task's distribution: logits in the shape of SHAPES, or embeddings [n, d].

    Raises PlanError for logits of another shape, or of a single class, whose probability is always 1.
    """
    if task == "embedding":
        return embeddings(output)
    x: Tensor = logits(output)
    if x.ndim != SHAPES[task].count(",") + 1:
        fitting = next((t for t, shape in SHAPES.items() if x.ndim == shape.count(",") + 1), None)
        remedy = f"the task {fitting!r} takes such logits" if fitting else "wrap it in a module that returns that"
        raise PlanError(
            f"the model returned logits of shape {list(x.shape)}, expected {SHAPES[task]} for the task {task!r}; "
            f"{remedy}"
        )
    if x.shape[-1] < 2:
        raise PlanError(
            f"the model returned logits of shape {list(x.shape)}: one class, whose probability is always 1; "
            "expected at least two. Take a model that tells classes apart"
        )
    return x


def scores_of(request: StatisticsRequest) -> LikelihoodScores:
    """A function from a model's output and its batch to the scores."""
    compute = {"classification": _classification, "lm": _language, "embedding": _embedding}[request.task]

    def scores(output: Any, batch: Batch) -> Iterator[Tensor]:
        x = outcome(request.task, output)
        return compute(x.to(torch.promote_types(x.dtype, torch.float32)), batch, request)

    return scores


def _classification(x: Tensor, batch: Batch, request: StatisticsRequest) -> Iterator[Tensor]:
    """x [n, classes]: for expected labels sqrt(p_y) log p_y for every class y, the root held fixed."""
    log_p = x.log_softmax(-1)
    if request.options["labels"] == "expected":
        yield from (log_p * log_p.detach().mul(0.5).exp()).unbind(-1)
    elif request.options["labels"] == "true":
        assert batch.labels is not None
        yield log_p.gather(-1, _check_range(batch.labels, x.shape[-1]).to(x.device)[:, None])[:, 0]
    else:
        yield from _sample(log_p[:, None], batch, request)


def _language(x: Tensor, batch: Batch, request: StatisticsRequest) -> Iterator[Tensor]:
    """x [n, tokens, vocabulary]: log p of tokens 2, 3, ... summed, each after the true ones before it.

    The scores of different positions are uncorrelated under the model, so that the square of the sum, for drawn
    tokens, has the expectation of the sum of squares.
    """
    ids = batch.kwargs["input_ids"] if "input_ids" in batch.kwargs else batch.args[0]
    log_p = x[:, :-1].log_softmax(-1)
    if request.options["labels"] == "true":
        yield log_p.gather(-1, ids[:, 1:, None].to(x.device)).sum((1, 2))
    else:
        yield from _sample(log_p, batch, request)


def _sample(log_p: Tensor, batch: Batch, request: StatisticsRequest) -> Iterator[Tensor]:
    """log_p [n, draws, classes]: for every sample, the summed log p of its draws over the root of the sample count."""
    samples, seed = request.whole("samples"), request.whole("seed")
    for sample in range(samples):
        draws = []
        for index, row in zip(batch.indices, log_p.detach(), strict=True):
            odds = row.double().cpu().exp().cumsum(-1)
            u = torch.rand(len(row), 1, generator=_generator(seed, index, sample), dtype=torch.float64)
            draws.append(torch.searchsorted(odds, u * odds[:, -1:]).clamp_(max=row.shape[-1] - 1))
        indices = torch.stack(draws).to(log_p.device)  # [n, draws, 1]
        yield log_p.gather(-1, indices).sum((1, 2)) / math.sqrt(samples)


def _embedding(x: Tensor, batch: Batch, request: StatisticsRequest) -> Iterator[Tensor]:
    """x [n, d], the mean of a Gaussian of unit variance: its entries, or their products with Gaussian noise."""
    if request.options["labels"] == "expected":
        yield from x.unbind(-1)
        return
    samples, seed = request.whole("samples"), request.whole("seed")
    for sample in range(samples):
        draws = [
            torch.randn(x.shape[-1], generator=_generator(seed, index, sample), dtype=torch.float64)
            for index in batch.indices
        ]
        yield (x * torch.stack(draws).to(x)).sum(-1) / math.sqrt(samples)


def _generator(seed: int, index: int, sample: int) -> torch.Generator:
    return torch.Generator().manual_seed(key(seed, f"sample {sample}", index))


def _check_range(labels: Tensor, classes: int) -> Tensor:
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise PlanError(
            f"found the label {int(wrong[0])}, expected 0 to {classes - 1}, the classes of the model. Correct it"
        )
    return labels
