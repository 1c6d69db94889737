"""Show models' scores on data: a row for each model and file, and the means."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_lfm.commands.show.patches import counts_text, scores_text
from mergekit_lfm.commands.show.terminal import table

if TYPE_CHECKING:
    from mergekit_lfm.judge.evaluate import Score

ScoreTable = Mapping[str, Mapping[str, Any]]  # scores of one kind by model, then by file


def arithmetic(numbers: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(numbers) / len(numbers)


def geometric(numbers: Sequence[float]) -> float:
    """The geometric mean of numbers of at least 1."""
    return math.exp(arithmetic([math.log(number) for number in numbers]))


class Column(NamedTuple):
    """One number of a score: its heading, its format, and the function for its mean, if any."""

    heading: str
    form: str
    mean: Callable[[Sequence[float]], float] | None = None


class Judgement(NamedTuple):
    """How to show a kind of score: the kind of data it is on, and its columns by their names in the score."""

    on: str
    columns: dict[str, Column]


JUDGEMENTS = {
    "Perplexity": Judgement(
        "text",
        {
            "tokens": Column("tokens", ","),
            "perplexity": Column("perplexity", ".4g", geometric),
            "bits_per_byte": Column("bits/byte", ".4f", arithmetic),
        },
    ),
    "Accuracy": Judgement(
        "file",
        {
            "examples": Column("examples", ","),
            "correct": Column("correct", ","),
            "accuracy": Column("accuracy", ".4f", arithmetic),
        },
    ),
    "Retrieval": Judgement(
        "file",
        {
            "pairs": Column("pairs", ","),
            "top1": Column("top-1", ".4f", arithmetic),
            "mrr": Column("MRR", ".4f", arithmetic),
        },
    ),
    "TokenLoss": Judgement(
        "file",
        {
            "examples": Column("examples", ","),
            "tokens": Column("tokens", ","),
            "perplexity": Column("perplexity", ".4g", geometric),
        },
    ),
    "Fit": Judgement(
        "file",
        {
            "examples": Column("examples", ","),
            "error": Column("squared error", ".4g", arithmetic),
            "correlation": Column("correlation", ".4f", arithmetic),
        },
    ),
}


def _judgement(scores: ScoreTable) -> Judgement:
    first = next(score for files in scores.values() for score in files.values())
    return JUDGEMENTS[type(first).__name__]


def evaluation_data(scores: ScoreTable) -> list[dict[str, Any]]:
    """Each model's numbers on every text or file, and their means, for JSON.

    JSON has null for infinity and NaN.
    """
    on, columns = _judgement(scores)
    return [
        {
            "model": model,
            f"{on}s": [{on: name, **_finite(asdict(score))} for name, score in files.items()],
            "mean": _finite(_means(columns, list(files.values()))),
        }
        for model, files in scores.items()
    ]


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {key: number if math.isfinite(number) else None for key, number in numbers.items()}


def _means(columns: dict[str, Column], scores: Sequence[Score]) -> dict[str, float]:
    means = {name: column.mean for name, column in columns.items() if column.mean is not None}
    return {name: mean([getattr(score, name) for score in scores]) for name, mean in means.items()}


def evaluation_text(scores: ScoreTable) -> str:
    """A table with one row for each model and file, and the means if there are several files."""
    on, columns = _judgement(scores)
    headings = [column.heading for column in columns.values()]
    rows = [("model", on, *headings)]
    for model, files in scores.items():
        for name, score in files.items():
            rows.append((model, name, *(format(getattr(score, key), c.form) for key, c in columns.items())))
        if len(files) > 1:
            mean = _means(columns, list(files.values()))
            rows.append((model, "mean", *(format(mean[k], c.form) if k in mean else "" for k, c in columns.items())))
    return table(rows, right=" ".join(headings))


def matrix_text(scores: ScoreTable) -> str:
    """A table with a row for each model and a column for each file, of the first number that has a mean."""
    _, columns = _judgement(scores)
    name, form, mean = next((name, f"#{each.form}", each.mean) for name, each in columns.items() if each.mean)
    files = list(next(iter(scores.values())))
    short = {file: PurePath(file).stem for file in files}
    headings = [short[file] if [*short.values()].count(short[file]) == 1 else file for file in files]
    rows = [(columns[name].heading, *headings, "mean")]
    for model, own in scores.items():
        numbers = [getattr(own[file], name) for file in files]
        rows.append((model, *(format(x, form) for x in (*numbers, mean(numbers)))))
    return table(rows, right=" ".join([*headings, "mean"]))


def choices_text(chosen: Mapping[str, Mapping[str, int]]) -> str:
    """A line for each file: how many of its texts each expert was sent."""
    rows = {name: ", ".join(f"{count:,} to {expert}" for expert, count in own.items()) for name, own in chosen.items()}
    return "\n".join(f"{name}: {shares}" for name, shares in rows.items())


def facts_data(scores: ScoreTable) -> list[dict[str, Any]]:
    """Each model's scores on a facts file, for JSON."""
    return [
        {"model": model, "facts": name, **score.as_data()}
        for model, files in scores.items()
        for name, score in files.items()
    ]


def facts_text(scores: ScoreTable) -> str:
    """A table with one row of shares for each model, and the numbers of prompts."""
    rows = {model: score.as_data() for model, files in scores.items() for score in files.values()}
    return f"{scores_text(rows)}\n{counts_text(next(iter(rows.values())))}"
