"""Kill commands COUNT times at random moments, run each again, and print the numbers of kills by command and moment.

    python scripts/kills.py COUNT [SEED]

Stops at the first output that is neither complete nor absent, at the first input that was changed, and at the first
command that does not go on to the bytes of an uninterrupted run.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers_jobs import COMMANDS, open_bench
from helpers_kills import MOMENTS, kill_at_random


def main(count: int, seed: int = 0) -> None:
    """Print a line for each command, and the total."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bench").mkdir()
        with open_bench(Path(folder) / "bench") as bench:
            outcomes = kill_at_random(bench, count, seed)
    print(f"{'killed ... it wrote':20}", *(f"{moment:>8}" for moment in MOMENTS))
    for name in COMMANDS:
        print(f"{name:20}", *(f"{outcomes[name, moment]:8,}" for moment in MOMENTS))
    print(f"{'all':20}", *(f"{sum(outcomes[name, moment] for name in COMMANDS):8,}" for moment in MOMENTS))
    print(f"{count:,} kills in {time.monotonic() - started:.0f} seconds; every output went on to the same bytes")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
