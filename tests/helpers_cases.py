"""Which combinations of values a test runs with: few that hold every pair of values, with LONG_TESTS=1 all."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(*sizes: int) -> list[tuple[int, ...]]:
    """Few rows of indices below the sizes that hold every pair of two columns; the best row is always taken first."""
    rows = list(product(*map(range, sizes)))
    pairs = {row: {(i, row[i], k, row[k]) for i, k in combinations(range(len(sizes)), 2)} for row in rows}
    missing, chosen = set[tuple[int, ...]]().union(*pairs.values()), []
    while missing:
        best = max(rows, key=lambda row: len(pairs[row] & missing))
        missing -= pairs[best]
        chosen.append(best)
    return chosen


def cases(*axes: Sequence[Any], needs: Callable[..., Any] = lambda *_: ()) -> list[Any]:
    """Combinations of the axes' values for `parametrize`; those that `pairwise` leaves out are slow, and LONG_TESTS.

    A fault of one value or of two together shows in the default run. `needs` gives further marks of a combination.
    """
    chosen = set(pairwise(*map(len, axes)))
    every = product(*(range(len(axis)) for axis in axes))
    made = []
    for row in every if "LONG_TESTS" in os.environ else sorted(chosen):
        values = [axis[i] for axis, i in zip(axes, row, strict=True)]
        marks = needs(*values)
        marks = list(marks) if isinstance(marks, tuple | list) else [marks]
        made.append(pytest.param(*values, marks=marks + ([] if row in chosen else [pytest.mark.slow])))
    return made
