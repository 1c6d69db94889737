"""Numbers of several seeds: their means, with standard errors."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error; 0 for one value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def print_spreads(scores: Sequence[Mapping[str, float]], name: str, number: str) -> None:
    """Print a table of the numbers of each seed, by their names. name, number: its headings."""
    print(f"| {name} | {number} |\n|---|--:|")
    for each in scores[0]:
        mean, error = spread([own[each] for own in scores])
        print(f"| {each} | {mean:.1f} ± {error:.1f} |", flush=True)
