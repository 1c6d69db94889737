"""Measure the seconds of planning: models with many tensors, merged whole and in slices.

    python benchmarks/planning.py                   # 10,000 tensors, 48 layers
    python benchmarks/planning.py --tensors 100     # a smoke test

The models have headers alone: their data are holes in the files. A row is the median of a few plans, with its digest,
in a process that has planned before. The time per tensor should not depend on the number of slices.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.tensors import TensorSpec, encode_header

LAYERS = 48
MODELS = ("one", "two")


def write_model(folder: Path, tensors: int) -> None:
    """A model of about so many tensors, most of them experts."""
    folder.mkdir()
    names = [
        f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in range(LAYERS) for e in range(tensors // LAYERS)
    ]
    names = ["model.embed_tokens.weight", *names, "model.norm.weight", "lm_head.weight"]
    specs = [TensorSpec(name, (8, 8), "bfloat16") for name in names]
    header, _ = encode_header(specs, {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(spec.nbytes for spec in specs))
    config = {"model_type": "llama", "num_hidden_layers": LAYERS, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    """The recipes by the names of their rows."""
    lines = [{"model": str(folder / name)} for name in MODELS]
    linear = {"merge_method": "linear", "parameters": {"weight": [1.0, 2.0]}}
    found: dict[str, dict[str, Any]] = {"two models": {**linear, "models": lines}}
    for count in (2, LAYERS):
        width = LAYERS // count
        spans = [[i, i + width] for i in range(0, LAYERS, width)]
        for models, more in ((lines[:1], {"merge_method": "passthrough"}), (lines, linear)):
            slices = [{"sources": [{**line, "layer_range": span} for line in models]} for span in spans]
            found[f"{count} slices of {len(models)}"] = {**more, "slices": slices}
    return found


def measure(recipe: dict[str, Any], repeats: int) -> tuple[int, float]:
    """The number of tensors, and the seconds of a plan."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        plan = make_plan(Recipe.parse(recipe))
        _ = plan.digest
        seconds.append(time.perf_counter() - started)
    return len(plan.tensors), statistics.median(seconds)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=10_000, help="of a model, about")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in MODELS:
            write_model(folder / model, arguments.tensors)
        rows = recipes(folder)
        measure(next(iter(rows.values())), 1)
        print("| recipe | tensors | seconds | us per tensor |\n|---|---|---|---|")
        for row, recipe in rows.items():
            count, seconds = measure(recipe, arguments.repeats)
            print(f"| {row} | {count:,} | {seconds:.2f} | {1e6 * seconds / count:.0f} |")


if __name__ == "__main__":
    main()
