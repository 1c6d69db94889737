"""Readers meet damaged and hostile files: each is read right, or refused with one of the two errors."""

from __future__ import annotations

import os
import resource
from collections import Counter
from pathlib import Path

import pytest
from helpers_fuzz import KINDS, count_outcomes

COUNT = 20_000 if "LONG_TESTS" in os.environ else 6_000


def check(outcomes: Counter[tuple[str, str]]) -> None:
    """Inputs of every class were read, and some refused."""
    for name in KINDS:
        refused = outcomes[name, "FormatError"] + outcomes[name, "PlanError"]
        assert refused or name == "journal", name
        assert outcomes[name, "right"] + refused == sum(n for (of, _), n in outcomes.items() if of == name)


def test_a_few_hundred_inputs_are_read_right_or_refused(tmp_path: Path) -> None:
    check(count_outcomes(40 * len(KINDS), tmp_path))


@pytest.mark.slow
def test_thousands_of_inputs_are_read_right_or_refused_in_bounded_memory(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = count_outcomes(COUNT, tmp_path, first=1_000)
    check(outcomes)
    assert all(outcomes[name, "right"] for name in KINDS)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000, "kilobytes"
