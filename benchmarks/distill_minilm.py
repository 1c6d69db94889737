"""Distil all-MiniLM-L6-v2, of six layers, into a student of three, on docstrings without labels.

    python benchmarks/distill_minilm.py             # some ten minutes on one core
    python benchmarks/distill_minilm.py --steps 5   # a smoke test

Makes the model and its data (recipes/make/minilm_finetunes.py), a student of half of its layers and one with random
weights, and distils both by the same steps: the vectors of texts, and the hidden states of the layers that stay.
Numbers are how often a text's own positive is the nearest of all held-out ones, for first lines and what follows them
(`details`), and for names and first lines (`names`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mergekit_lfm import distill_model, make_student, retrieval
from mergekit_lfm.runtime.load import load_model

MAKE = Path(__file__).parents[1] / "recipes" / "make" / "minilm_finetunes.py"
LAYERS = [0, 2, 5]
FOLLOWED = {1: 1, 2: 3, 3: 6}


def main() -> None:
    """Run the comparison, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        subprocess.run([sys.executable, str(MAKE), place], check=True, stdout=sys.stderr)
        teacher, data = folder / "base", [folder / "details.jsonl", folder / "names.jsonl"]
        make_student(teacher, folder / "cut", layers=LAYERS)
        make_student(teacher, folder / "new", layers=LAYERS, random=True)
        how: dict[str, Any] = {"task": "embedding", "window": 32, "batch_size": 16, "threads": 1, "warmup": 0.1}
        how |= {"loss": {"embed": 1.0, "hint": 0.1}, "layers": FOLLOWED, "learning_rate": 3e-4, "steps": steps}
        print("| student | details | names | of the teacher's | seconds |\n|---|--:|--:|--:|--:|")
        best = dict[str, float]()
        for name in ("base", "cut", "new", "cut, distilled", "new, distilled"):
            started, model = time.monotonic(), folder / name
            if "," in name:
                distill_model(folder / name.partition(",")[0], teacher, data, model, **how)
            seconds = time.monotonic() - started
            loaded = load_model(model, "embedding")
            scores = {kind: retrieval(loaded, folder / f"{kind}.test.jsonl").top1 for kind in ("details", "names")}
            best = best or scores
            share = sum(scores.values()) / sum(best.values())
            shown = " | ".join(f"{score:.3f}" for score in scores.values())
            print(f"| {name} | {shown} | {share:.1%} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
