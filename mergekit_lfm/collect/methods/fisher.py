"""The diagonal of the Fisher information: how much each parameter matters to the model's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_lfm.methods.kinds import Options, StatisticMethod
from mergekit_lfm.methods.method import Parameter

if TYPE_CHECKING:
    from mergekit_lfm.collect.request import Collector, Outline, Statistic, StatisticsRequest
    from mergekit_lfm.runtime.subject import Subject


def start(request: StatisticsRequest) -> Statistic:
    """Prepare the sums of squared gradients, entry by entry."""
    from mergekit_lfm.collect.fisher import FisherStatistic

    return FisherStatistic(request)


def settle(task: str, options: Options) -> Options:
    """The labels, by default the first that the task has; for sampled ones, how many and from which seed."""
    from mergekit_lfm.collect.likelihoods import resolve_labels

    labels = resolve_labels(task, options["labels"])
    drawn = ("samples", "seed") if labels == "sampled" else ()
    return {"labels": labels, **{name: options[name] for name in drawn}}


def outline(subject: Subject, patterns: Sequence[str]) -> Outline:
    """An entry for each parameter."""
    from mergekit_lfm.collect.fisher import outline_fisher

    return outline_fisher(subject, patterns)


METHODS: tuple[Collector, ...] = (
    StatisticMethod(
        name="fisher",
        source="Matena and Raffel 2022, Merging models with Fisher-weighted averaging, arXiv 2111.09832",
        summary="how much each parameter of MODEL matters to its predictions: the diagonal Fisher information",
        doc="For `merge_method: fisher`. For every parameter the mean over examples of the squared gradient of the "
        "log-probability of a label, each example by itself.",
        examples=(
            "--data a.jsonl --task classification -o a.safetensors",
            "--data a.txt --task lm --labels true -o a.safetensors",
        ),
        parameters=(
            Parameter(
                "labels",
                None,
                kind="str",
                choices=("expected", "sampled", "true"),
                unset="expected for classification, else sampled",
                doc="the labels whose gradients are taken: expected averages over all classes, sampled draws from the "
                "model's own predictions, true takes those of the data",
            ),
            Parameter(
                "samples",
                1,
                kind="int",
                minimum=1,
                doc="for --labels sampled: the number of draws for each example",
            ),
            Parameter(
                "seed",
                0,
                kind="int",
                minimum=0,
                maximum=2**64 - 1,
                doc="for --labels sampled: the number from which the draws are made; the same one gives the same",
            ),
        ),
        settle=settle,
        start=start,
        outline=outline,
    ),
)
