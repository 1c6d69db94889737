"""Score models on data, in numbers that compare merges.

Language models by rolling log-likelihood, which predicts every token of a text exactly once; bits per byte divide by
the UTF-8 bytes of the text, not by tokens, and so compare models with different tokenizers; perplexities compare only
models with the same tokenizer. Classifiers by accuracy, sentence encoders by retrieval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.errors import PlanError
from mergekit_lfm.runtime.batches import Batch, as_batches
from mergekit_lfm.runtime.data import read_data, read_pairs
from mergekit_lfm.runtime.images import find_images
from mergekit_lfm.runtime.load import Loaded, embeddings, load_model, logits, run, start_token, tokenizer_for_texts
from mergekit_lfm.train.examples import Examples
from mergekit_lfm.train.pictures import picture_examples

# The logits of a window are [window, vocabulary] in float32: 1 GB for 2,048 tokens and 128k entries. The 131,072
# positions that recent models declare would take 67 GB.
LM_WINDOW = 2048
ROWS = 1024  # texts to compare with all positives at a time: 400 MB for 100,000 positives


@dataclass(frozen=True)
class Perplexity:
    """How badly a model predicts one text, or the documents of one file; less is better."""

    tokens: int  # predicted tokens
    bytes: int  # of the text in UTF-8
    nll: float  # sum of -ln p over all tokens, in nats
    perplexity: float  # exp(nll / tokens)
    bits_per_byte: float  # nll / ln 2 / bytes


@dataclass(frozen=True)
class Accuracy:
    """How often a classifier is right; more is better."""

    examples: int
    correct: int
    accuracy: float  # correct / examples


@dataclass(frozen=True)
class Retrieval:
    """How well an encoder finds each text's own positive; more is better."""

    pairs: int
    top1: float  # the share of texts whose own positive is the nearest of all
    mrr: float  # mean of 1 / the rank of the own positive


Score = Perplexity | Accuracy | Retrieval


def perplexity(
    model: str | Path | Loaded, text: str | Sequence[str], *, window: int | None = None, stride: int | None = None
) -> Perplexity:
    """Rolling log-likelihood of the whole text under a causal language model (a folder, or a loaded model).

    The tokens of the text, without special ones, follow one start token: the tokenizer's BOS, else its EOS. They are
    predicted in pieces of `stride`, each piece from the `window` tokens that end where it ends: a token is predicted
    from at least `window - stride + 1` tokens before it (all, near the beginning) and at most `window`. `window` is by
    default the longest sequence the model's config allows, but at most 2,048; `stride` is by default the window, which
    is cheapest. A smaller stride gives tokens more context: better numbers, for more work. Every document starts anew.

    Raises PlanError for an empty text and for a window or stride that the model does not support, FormatError for a
    tokenizer without a start token.
    """
    model = model if isinstance(model, Loaded) else load_model(model, "lm")
    window, stride = window_and_stride(model, window, stride)
    tokenizer = tokenizer_for_texts(model.tokenizer)
    documents = [text] if isinstance(text, str) else text
    count, total = 0, 0.0
    for document in documents:
        tokens = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [start_token(tokenizer), *tokens]  # ids[i] stands before tokens[i]
        for begin, first, end in pieces(len(tokens), window, stride):
            total += _nll(model.model, ids[begin:end], tokens[first:end])
        count += len(tokens)
    if not count:
        raise PlanError("the text is empty: there is nothing to predict; give a text of at least one token")
    size = sum(len(document.encode()) for document in documents)
    return perplexity_of(count, size, total)


def perplexity_of(tokens: int, nbytes: int, nll: float) -> Perplexity:
    """The numbers that follow from a sum of -ln p over tokens of texts of so many bytes."""
    return Perplexity(tokens, nbytes, nll, _exp(nll / tokens), nll / math.log(2) / nbytes)


def pieces(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end) of each piece: it predicts tokens first..end from the ids begin..end, where ids[0] is the
    start token and ids[i + 1] is token i. The ranges first..end cover 0..count without overlap."""
    for first in range(0, count, stride):
        end = min(first + stride, count)
        yield max(0, end - window), first, end


def window_and_stride(model: Loaded, window: int | None, stride: int | None) -> tuple[int, int]:
    """The window and the stride, or their defaults for the model. Raises PlanError for values out of its range."""
    positions = model.positions
    if window is None:
        window = min(positions or LM_WINDOW, LM_WINDOW)
    if stride is None:
        stride = window
    if window < 1 or (positions is not None and window > positions):
        limit = "at least 1" if positions is None else f"from 1 to {positions}, the positions of the model"
        limit += f" behind {model.virtual} virtual tokens" if model.virtual else ""
        raise PlanError(f"window is {window}; expected {limit}. Choose a window in that range, or leave it out")
    if not 1 <= stride <= window:
        raise PlanError(
            f"stride is {stride}; expected 1 to {window}, the window. Choose one in between, or leave it out"
        )
    return window, stride


def _nll(model: nn.Module, ids: list[int], targets: list[int]) -> float:
    """The sum of -ln p over the targets, which follow the last len(targets) of ids; in nats."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        output = run(model, (torch.tensor([ids], device=device),), {"use_cache": False})
        scores = logits(output)[0, -len(targets) :].float().log_softmax(-1)  # [targets, vocabulary]
        chosen = scores.gather(-1, torch.tensor(targets, device=device)[:, None])
    return -float(chosen.double().sum())


def _exp(nats: float) -> float:
    """exp, or infinity beyond the range of a float, so that a broken model gets a score instead of an error."""
    return math.exp(nats) if nats < 709 else math.inf


def accuracy(
    model: str | Path | Loaded | nn.Module,
    data: str | Path | Iterable[Any],
    *,
    window: int | None = None,
    batch_size: int = 16,
) -> Accuracy:
    """The share of labelled examples whose most likely class is their label.

    model is a folder, a loaded model, or any module that returns logits [n, classes], in evaluation mode; data a file
    for `read_data`, images for a model of transformers (`find_images`), or any input of `as_batches`. The first of
    equally likely classes wins; NaN scores count as wrong. Raises PlanError for data without labels, or with labels of
    classes that the model lacks.
    """
    if isinstance(model, str | Path):
        model = load_model(model, "classification")
    batches = _batches(model, data, window, batch_size)
    module = model.model if isinstance(model, Loaded) else model
    correct, count = 0, 0
    for batch in batches:
        if batch.labels is None:
            raise PlanError("the data have no labels; expected one for each example. Give data with labels")
        scores = logits(_forward(module, batch))  # [n, classes]
        labels = batch.labels.to(scores.device)
        if scores.ndim != 2 or int(labels.max()) >= scores.shape[1] or int(labels.min()) < 0:
            raise PlanError(
                f"the model gives scores {list(scores.shape)}, the labels go from {int(labels.min())} to "
                f"{int(labels.max())}; expected scores [examples, classes], and labels of these classes. "
                "Give data that the classifier was made for"
            )
        right = (scores.argmax(1) == labels) & ~scores.isnan().any(1)
        correct, count = correct + int(right.sum()), count + len(batch)
    return Accuracy(count, correct, correct / count)


def retrieval(
    model: str | Path | Loaded, pairs: str | Path, *, window: int | None = None, batch_size: int = 16
) -> Retrieval:
    """How often an encoder's vector of a text is nearest to that of the text's own positive.

    pairs is a JSONL file of {"text": ..., "positive": ...}. The vectors are means over tokens, nearness is the cosine,
    and every text is compared with all distinct positives of the file. Ties count against the model: one with the same
    vector for everything scores 0.
    """
    model = model if isinstance(model, Loaded) else load_model(model, "embedding")
    texts, positives, own = read_pairs(
        pairs, model.tokenizer, window=window, positions=model.positions, batch_size=batch_size
    )
    left, right = unit_vectors(model.model, texts), unit_vectors(model.model, positives)
    ranks = torch.cat([_ranks(left[i : i + ROWS] @ right.T, own[i : i + ROWS]) for i in range(0, len(left), ROWS)])
    return Retrieval(len(own), float((ranks == 1).double().mean()), float((1 / ranks.double()).mean()))


def _ranks(similarity: Tensor, own: Sequence[int]) -> Tensor:
    """The rank, from 1, of each row's own column among the columns of similarity [n, m]; NaN comes last."""
    right = similarity.gather(1, torch.tensor(own, device=similarity.device)[:, None])
    return (~(similarity < right)).sum(1)


def unit_vectors(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """The unit vector of every example, float64 [examples, d], in the order of their numbers."""
    vectors = torch.cat([embeddings(_forward(model, batch)).double() for batch in batches])
    order = torch.tensor([i for batch in batches for i in batch.indices], device=vectors.device)
    return nn.functional.normalize(vectors, dim=1)[order.argsort()]


def _forward(model: nn.Module, batch: Batch) -> Any:
    batch = batch.to(model)
    with torch.inference_mode():
        return run(model, batch.args, batch.kwargs)


def _batches(
    model: Loaded | nn.Module, data: str | Path | Iterable[Any], window: int | None, batch_size: int
) -> Iterable[Batch]:
    if not isinstance(data, str | Path):
        return as_batches(data)
    if isinstance(model, Loaded):
        config: Any = model.model.config
        images = find_images(Path(data), getattr(config, "label2id", None))
        if images is not None:
            return _of_images(picture_examples(Path(data), images, model), batch_size)
    tokenizer, positions = (model.tokenizer, model.positions) if isinstance(model, Loaded) else (None, None)
    return read_data(data, "classification", tokenizer, window=window, positions=positions, batch_size=batch_size)


def _of_images(examples: Examples, size: int) -> Iterator[Batch]:
    """Batches of images, each read when it is wanted."""
    for start, batch in zip(range(0, len(examples), size), examples.in_order(size), strict=True):
        labels = batch.pop("labels")
        yield Batch(tuple(range(start, start + len(labels))), kwargs=batch, labels=labels)
