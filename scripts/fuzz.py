"""Read COUNT damaged and hostile inputs, and print how many there were of each class and outcome.

    python scripts/fuzz.py COUNT [FIRST]

Stops at the first error that is not one of ours, and names the input. FIRST: the seed to begin with, default 0.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers_fuzz import count_outcomes


def main(count: int, first: int = 0) -> None:
    """Print a line for each class and outcome, and the total."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = count_outcomes(count, Path(folder), first)
    for (name, outcome), number in sorted(outcomes.items()):
        print(f"{name:15} {outcome:12} {number:9,}")
    print(f"{'all':28} {outcomes.total():9,} in {time.monotonic() - started:.0f} seconds")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
