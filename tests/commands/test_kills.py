"""Every command that writes is killed at random moments, and then does its work to the same bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers_jobs import COMMANDS, open_bench
from helpers_kills import MOMENTS, kill_at_random

EACH = 3 if "LONG_TESTS" in os.environ else 1  # kills of each command


@pytest.mark.slow
def test_commands_killed_at_random_moments(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    with open_bench(tmp_path / "bench") as bench:
        outcomes = kill_at_random(bench, EACH * len(COMMANDS), seed=1)
    assert all(sum(outcomes[name, moment] for moment in MOMENTS) >= EACH for name in COMMANDS)
