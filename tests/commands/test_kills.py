"""Every command that writes is killed at random moments, and then does its work to the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_jobs import COMMANDS, open_bench
from helpers_kills import MOMENTS, kill_at_random


@pytest.mark.slow
def test_commands_killed_at_random_moments(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    with open_bench(tmp_path / "bench") as bench:
        outcomes = kill_at_random(bench, 50, seed=1)
    assert all(sum(outcomes[name, moment] for moment in MOMENTS) >= 2 for name in COMMANDS)
