"""The kinds of statistics by name. A new one is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Callable

from mergekit_lfm.collect.fisher import Fisher
from mergekit_lfm.collect.moments import Cross, Gram
from mergekit_lfm.collect.request import Request, Statistic

STATISTICS: dict[str, Callable[[Request], Statistic]] = {"gram": Gram, "cross": Cross, "fisher": Fisher}
