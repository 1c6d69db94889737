"""The kinds of statistics by name. A new one is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Callable

from mergekit_lfm.collect.fisher import FisherStatistic
from mergekit_lfm.collect.moments import CrossStatistic, GramStatistic
from mergekit_lfm.collect.request import Statistic, StatisticsRequest

STATISTICS: dict[str, Callable[[StatisticsRequest], Statistic]] = {
    "gram": GramStatistic,
    "cross": CrossStatistic,
    "fisher": FisherStatistic,
}
