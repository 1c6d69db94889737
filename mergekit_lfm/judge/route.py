"""Send each text to the expert whose own texts are most like it, and score the experts on what they are sent.

Texts are compared by their n-grams of characters, weighted by TF-IDF, without a model; or by a model of sentences.
Source: Jang et al. 2023, arXiv 2302.03202, section 3.2, which retrieves from single examples; here an expert is the
mean of its texts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.judge.evaluate import Accuracy, Perplexity, accuracy, perplexity, perplexity_of, unit_vectors
from mergekit_lfm.runtime.batches import Batch
from mergekit_lfm.runtime.data import group_rows, read_data, text_limit
from mergekit_lfm.runtime.lines import read_lines, read_objects
from mergekit_lfm.runtime.load import Loaded, tokenizer_for_texts

BATCH_SIZE = 16  # texts that an encoder reads at once
SIZES = (3, 4, 5)  # of n-grams: names of things and their endings, and not whole words alone

Vector = Mapping[str, float]  # weights by n-gram
Routable = Perplexity | Accuracy


class Router:
    """The experts, each the mean of the vectors of its texts, of length 1. texts: of each expert, at least one."""

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        counts = [[Counter(_grams(text)) for text in own] for own in texts]
        if not counts or not all(counts):
            raise PlanError("the router needs one text or more of each expert; give each a file with some")
        self.size = sum(map(len, counts))
        self.frequencies = Counter(gram for own in counts for each in own for gram in each)
        self.experts = [_mean([self._vector(each) for each in own]) for own in counts]

    def choose(self, text: str) -> int:
        """The number of the expert that is nearest by the cosine; the first of equally near ones."""
        vector = self._vector(Counter(_grams(text)))
        nearness = [sum(weight * expert.get(gram, 0.0) for gram, weight in vector.items()) for expert in self.experts]
        return nearness.index(max(nearness))

    def _vector(self, counts: Counter[str]) -> Vector:
        """(1 + ln count) (1 + ln((1 + texts) / (1 + texts with it))) of each n-gram, scaled to length 1."""
        return _scale(
            {
                gram: (1 + math.log(count)) * (1 + math.log((1 + self.size) / (1 + self.frequencies[gram])))
                for gram, count in counts.items()
            }
        )


def choose_by_encoder(
    encoder: Loaded, experts: Sequence[Sequence[str]], texts: Sequence[str], *, window: int | None = None
) -> list[int]:
    """The number of each text's expert, by a model of sentences: that with the nearest mean, by the cosine."""
    tokenizer = tokenizer_for_texts(encoder.tokenizer)
    limit = text_limit(window, encoder.positions, tokenizer)
    options: dict[str, Any] = {"truncation": limit is not None, "max_length": limit, "verbose": False}

    def embed(own: Sequence[str]) -> Tensor:
        return unit_vectors(encoder.model, group_rows(tokenizer([*own], **options)["input_ids"], None, BATCH_SIZE))

    means = torch.stack([torch.nn.functional.normalize(embed(own).mean(0), dim=0) for own in experts])
    chosen: list[int] = (embed(texts) @ means.T).argmax(1).tolist()
    return chosen


def _grams(text: str) -> Iterator[str]:
    """The n-grams of each word with a blank on both sides; one that is shorter counts once, as a whole."""
    for word in text.lower().split():
        padded = f" {word} "
        for size in SIZES:
            yield from (padded[i : i + size] for i in range(max(1, len(padded) - size + 1)))
            if len(padded) <= size:
                break


def _mean(vectors: Sequence[Vector]) -> Vector:
    total: dict[str, float] = {}
    for vector in vectors:
        for gram, weight in vector.items():
            total[gram] = total.get(gram, 0.0) + weight
    return _scale(total)


def _scale(vector: Vector) -> Vector:
    """The vector with length 1; one of no n-gram stays."""
    length = math.sqrt(sum(weight * weight for weight in vector.values()))
    return {gram: weight / length for gram, weight in vector.items()}


def read_texts(path: Path) -> list[str]:
    """The texts of a data file of any form that `tune` takes but arrays: each line's, all its turns as one."""
    if path.suffix == ".txt":
        return [line.text for line in read_lines(path, whole=False)]
    expected = "an object with text, prompt and completion, or messages on each line"
    return [text for line in read_objects(path, _texts_of, expected) for text in line]


def _texts_of(entry: Mapping[str, object], line: int) -> list[str] | str:  # noqa: ARG001
    """The text of a line, or a description of its problem."""
    turns = entry.get("messages")
    parts = [entry.get(key) for key in ("text", "positive", "prompt", "completion")]
    parts += [each.get("content") for each in turns if isinstance(each, Mapping)] if isinstance(turns, list) else []
    text = "\n".join(part for part in parts if isinstance(part, str))
    return [text] if text.strip() else "no text"


def read_routed(path: Path, task: str) -> list[str]:
    """The texts of a file to judge on, as the task takes them: documents, or lines."""
    if path.suffix == ".npz":
        raise FormatError(
            f"{path}: found arrays; expected texts, by which a router chooses. Give a .jsonl or .txt file"
        )
    return [line.text for line in read_lines(path, whole=task == "lm")]


def score_part(
    model: Loaded, path: Path, texts: Sequence[str], numbers: Sequence[int], *, window: int | None, stride: int | None
) -> Routable:
    """The score of an expert on some of the texts of a file, which are given by their numbers."""
    if model.task == "lm":
        return perplexity(model, [texts[number] for number in numbers], window=window, stride=stride)
    chosen, found = {*numbers}, list[Batch]()
    for batch in read_data(path, model.task, model.tokenizer, window=window, positions=model.positions):
        rows = [row for row, number in enumerate(batch.indices) if number in chosen]
        if rows:
            inputs = {name: x[rows] for name, x in batch.kwargs.items()}
            labels = None if batch.labels is None else batch.labels[rows]
            found.append(Batch(tuple(batch.indices[row] for row in rows), kwargs=inputs, labels=labels))
    return accuracy(model, found)


def add_up(scores: Sequence[Routable]) -> Routable:
    """The score on all texts from those on parts of them."""
    return reduce(_add, scores)


def _add(one: Routable, other: Routable) -> Routable:
    if isinstance(one, Accuracy) and isinstance(other, Accuracy):
        examples, correct = one.examples + other.examples, one.correct + other.correct
        return Accuracy(examples, correct, correct / examples)
    assert isinstance(one, Perplexity) and isinstance(other, Perplexity)
    return perplexity_of(one.tokens + other.tokens, one.bytes + other.bytes, one.nll + other.nll)
