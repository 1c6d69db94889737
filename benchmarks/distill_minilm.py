"""Distil all-MiniLM-L6-v2, of six layers, into a student of three, on docstrings without labels.

    python benchmarks/distill_minilm.py                        # an hour and a half on one core
    python benchmarks/distill_minilm.py --steps 5 --texts 100  # a smoke test

Makes the model and its data (recipes/make/minilm_finetunes.py), a student of half of its layers and one with random
weights, and distils both by the same steps, so that texts have the teacher's vectors; the first student keeps the
teacher's embeddings. Texts are names, first lines and further lines of docstrings of installed packages, without
labels, and those that the fine-tunes have. Numbers are how often a text's own positive is the nearest of all held-out
ones, for first lines and what follows them (`details`), and for names and first lines (`names`), of functions of the
standard library.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from meta_search import SEEN, UNSEEN, functions_of

from mergekit_lfm import distill_model, make_student, retrieval
from mergekit_lfm.runtime.load import load_model

MAKE = Path(__file__).parents[1] / "recipes" / "make" / "minilm_finetunes.py"
LAYERS = [0, 2, 5]
LONGEST = 200  # letters of a text


def write_texts(file: Path, most: int) -> None:
    """Up to so many texts of installed packages, spread over them, each once."""
    parts = (part[:LONGEST] for package in (*SEEN, *UNSEEN) for each in functions_of(package) for part in each if part)
    texts = [*dict.fromkeys(parts)]
    chosen = texts[:: max(1, -(-len(texts) // most))]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
    print(f"# {len(chosen)} of {len(texts)} texts", file=sys.stderr)


def main() -> None:
    """Run the comparison, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--texts", type=int, default=30_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        subprocess.run([sys.executable, str(MAKE), place], check=True, stdout=sys.stderr)
        write_texts(folder / "packages.jsonl", options.texts)
        teacher, data = folder / "base", [folder / f"{name}.jsonl" for name in ("details", "names", "packages")]
        make_student(teacher, folder / "cut", layers=LAYERS)
        make_student(teacher, folder / "new", layers=LAYERS, random=True)
        how: dict[str, Any] = {"task": "embedding", "window": 32, "batch_size": 32, "threads": 1, "warmup": 0.1}
        how |= {"loss": {"embed": 1.0}, "learning_rate": 1e-3, "schedule": "cosine", "steps": options.steps}
        how |= {"cache": folder / "answers"}  # of the teacher, for both
        print("| student | details | names | of the teacher's | seconds |\n|---|--:|--:|--:|--:|")
        best = dict[str, float]()
        for name in ("base", "cut", "new", "cut, distilled", "new, distilled"):
            started, model = time.monotonic(), folder / name
            if "," in name:
                origin = name.partition(",")[0]
                own = how if origin == "new" else {**how, "train": "*encoder.layer*"}  # its words stay the teacher's
                distill_model(folder / origin, teacher, data, model, **own)
            seconds = time.monotonic() - started
            loaded = load_model(model, "embedding")
            scores = {kind: retrieval(loaded, folder / f"{kind}.test.jsonl").top1 for kind in ("details", "names")}
            best = best or scores
            share = sum(scores.values()) / sum(best.values())
            shown = " | ".join(f"{score:.3f}" for score in scores.values())
            print(f"| {name} | {shown} | {share:.1%} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
