"""Cross moments: the second moments between the inputs of the same layers of two models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_lfm.methods.kinds import StatisticMethod

if TYPE_CHECKING:
    from mergekit_lfm.collect.request import Collector, Statistic, StatisticsRequest


def start(request: StatisticsRequest) -> Statistic:
    """Prepare the sums of x y^T, x and y the inputs of a layer in two models, each with a 1."""
    from mergekit_lfm.collect.moments import CrossStatistic

    return CrossStatistic(request)


METHODS: tuple[Collector, ...] = (
    StatisticMethod(
        name="cross",
        source="Li et al. 2016, Convergent learning, arXiv 1511.07543",
        summary="the cross moments of the inputs of the same layers of two models",
        doc="For `align --stats`, which matches the units of MODEL with those of OTHER by their responses to the same "
        "data. For every layer of both, the mean over tokens of x y', where x and y are its inputs in the two models, "
        "each with a 1 at the end.",
        examples=("--data a.jsonl --task classification -o ab.safetensors",),
        models=2,
        start=start,
    ),
)
