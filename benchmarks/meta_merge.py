"""Fine-tunes of a meta-learned base, merged: do they merge better than those of the plain base?

    python benchmarks/meta_merge.py                      # three seeds, some ten minutes on one core
    python benchmarks/meta_merge.py --steps 2 --seeds 1  # a smoke test

The base is the quick start's language model. A start is learned on the docstrings of scipy and sklearn by Reptile, by
MAML of first order, or jointly, each on as many texts; then a model is tuned from each start on torch and one on
transformers, and both are averaged. Numbers are mean bits per byte over the two test sets: of the start, of the
fine-tunes on their own set, of the average, and the barrier, how much the average is worse than the fine-tunes are on
both sets in the mean. Means over seeds, with standard errors; less is better.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seeds import spread

from mergekit_lfm import merge, meta_train, perplexity, tune_model
from mergekit_lfm.runtime.data import read_documents
from mergekit_lfm.runtime.load import load_model

RECIPES = Path(__file__).parents[1] / "recipes"
BASE = RECIPES / "quickstart" / "base"
SEEN, UNSEEN = ("scipy", "sklearn"), ("torch", "transformers")
HOW: dict[str, Any] = {"task": "lm", "threads": 1, "window": 128}
COLUMNS = ("start", "fine-tunes", "average", "barrier")


def texts(name: str) -> Path:
    """The docstrings of a package."""
    return RECIPES / "experts" / f"{name}.jsonl"


def judged(model: Path) -> list[float]:
    """The bits per byte of a model on the test set of each package."""
    loaded = load_model(model, "lm")
    files = [RECIPES / "experts" / f"{name}.test.jsonl" for name in UNSEEN]
    return [perplexity(loaded, read_documents(file)).bits_per_byte for file in files]


def start_of(name: str, folder: Path, steps: int, seed: int) -> Path:
    """A start, by its name."""
    data, out = [texts(package) for package in SEEN], folder / f"start-{name}"
    if name == "plain":
        return BASE
    if name == "joint":
        tune_model(BASE, data, out, steps=steps, batch_size=64, learning_rate=1e-3, seed=seed, **HOW)
        return out
    how: dict[str, Any] = {**HOW, "learning_rate": 0.5 if name == "reptile" else 1e-3, "algorithm": name}
    how |= {"shots": 16, "queries": 16, "batch_size": 2, "inner_steps": 5, "inner_rate": 0.3}
    meta_train(BASE, data, out, steps=steps, seed=seed, **how)
    return out


def compare(name: str, folder: Path, steps: int, seed: int) -> list[float]:
    """The numbers of a start."""
    start, tuned = start_of(name, folder, steps, seed), list[Path]()
    for package in UNSEEN:
        out = folder / f"{name}-{package}"
        tune_model(start, texts(package), out, steps=steps, batch_size=16, learning_rate=1e-3, seed=seed, **HOW)
        tuned.append(out)
    models = [{"model": str(each), "parameters": {"weight": 0.5}} for each in tuned]
    merge({"merge_method": "linear", "models": models}, folder / f"{name}-average", card=False)
    scores = [judged(each) for each in tuned]
    ends, middle = sum(map(sum, scores)) / 4, sum(judged(folder / f"{name}-average")) / 2
    own = (scores[0][0] + scores[1][1]) / 2
    return [sum(judged(start)) / 2, own, middle, middle - ends]


def show(name: str, columns: Sequence[Sequence[float]]) -> None:
    """Print a row."""
    print(
        f"| {name} | " + " | ".join("{:.3f} ± {:.3f}".format(*spread(column)) for column in columns) + " |", flush=True
    )


def main() -> None:
    """Run the comparison, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    print(f"| base | {' | '.join(COLUMNS)} |\n|---|" + "--:|" * len(COLUMNS))
    for name in ("plain", "joint", "fomaml", "reptile"):
        rows = []
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as place:
                rows.append(compare(name, Path(place), options.steps, seed))
        show(name, [*zip(*rows, strict=True)])


if __name__ == "__main__":
    main()
