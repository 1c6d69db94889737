"""Gram matrices: the second moments of the inputs of linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_lfm.methods.kinds import StatisticMethod

if TYPE_CHECKING:
    from mergekit_lfm.collect.request import Collector, Outline, Statistic, StatisticsRequest
    from mergekit_lfm.runtime.subject import Subject


def start(request: StatisticsRequest) -> Statistic:
    """Prepare the sums of x x^T, x an input of a layer and a 1."""
    from mergekit_lfm.collect.moments import GramStatistic

    return GramStatistic(request)


def outline(subject: Subject, patterns: Sequence[str]) -> Outline:
    """A matrix for each linear layer."""
    from mergekit_lfm.collect.moments import outline_gram

    return outline_gram(subject, patterns)


METHODS: tuple[Collector, ...] = (
    StatisticMethod(
        name="gram",
        source="Jin et al. 2023, RegMean, arXiv 2212.09849; Meng et al. 2022, ROME, arXiv 2202.05262",
        summary="the second moments of the inputs of MODEL's linear layers",
        doc="For `merge_method: regmean`, and for `edit`. For every Linear and Conv1D the mean over tokens of x x', "
        "where x is its input with a 1 at the end. Layers that read the same input share one entry.",
        examples=(
            "--data a.jsonl --task classification -o a.safetensors",
            "--data a.txt --task lm --layers mlp -o a.safetensors",
        ),
        start=start,
        outline=outline,
    ),
)
