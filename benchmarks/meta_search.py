"""Search of functions in a package that is new: starts from meta-learning beside the model and joint training.

    python benchmarks/meta_search.py                       # two seeds, an hour and a half on one core
    python benchmarks/meta_search.py --steps 2 --seeds 1 --episodes 4  # a smoke test

The model is all-MiniLM-L6-v2, a package of Python a domain: first lines of docstrings have to find the names of their
functions. Starts are learned on six packages, by as many steps of as many pairs each: jointly, by MAML of first order,
and by Reptile. A task of the test is 16 pairs of sympy or of matplotlib to adapt on by plain descent, and 32 others;
numbers are how often a docstring's own name is the nearest of the 32, in percent: before adapting, and after it, in
the cell of one grid of rates and steps that is best for the start on other episodes. Means over seeds, with standard
errors.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from seeds import spread
from torch import Tensor

from mergekit_lfm.meta.algorithms import build_loss
from mergekit_lfm.meta.baselines import joint_start
from mergekit_lfm.meta.episodes import Episodes
from mergekit_lfm.meta.evaluate import evaluate
from mergekit_lfm.meta.losses import Inner, MetaLoss
from mergekit_lfm.recipe.meta_algorithms import ALGORITHMS
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.train.examples import Examples, join
from mergekit_lfm.train.loop import fit
from mergekit_lfm.train.texts import lengthen_for, read_examples

MAKE = Path(__file__).parents[1] / "recipes" / "make" / "minilm_finetunes.py"
SEEN, UNSEEN = ("numpy", "scipy", "sklearn", "networkx", "torch", "transformers"), ("sympy", "matplotlib")
MOST, WINDOW, SHOTS, QUERIES, TASKS = 1500, 16, 16, 32, 2
GRID = [Inner(count, rate) for rate in (0.01, 0.03, 0.1) for count in (1, 3)]
BEFORE = Inner(0, 0.0)
HOW: dict[str, tuple[Inner, dict[str, Any]]] = {
    "fomaml": (Inner(2, 0.03), {"learning_rate": 2e-5, "warmup": 0.1}),
    "reptile": (Inner(3, 0.03), {"learning_rate": 0.5, "optimizer": "sgd", "clip": 0.0}),
}


def functions_of(package: str) -> Iterator[tuple[str, str, str]]:
    """Of each public function its name in words behind its module's, its docstring's first line, and what follows."""
    for path in sorted((Path(sysconfig.get_path("purelib")) / package).rglob("*.py")):
        if "tests" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except SyntaxError:  # of a later Python
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                first, _, rest = (ast.get_docstring(node) or "").partition("\n")
                if len(first) >= 20:
                    yield f"{path.stem} {node.name}".replace("_", " "), first, " ".join(rest.split())


def write_pairs(folder: Path, package: str) -> Path:
    """A file of up to MOST pairs of a package, spread over it, each name and each line once."""
    by_name = {name: first for name, first, _ in functions_of(package)}
    found = [*{first: name for name, first in by_name.items()}.items()]
    chosen = found[:: -(-len(found) // MOST)]
    file = folder / f"{package}.jsonl"
    file.write_text("".join(json.dumps({"text": a, "positive": b}) + "\n" for a, b in chosen))
    print(f"# {package}: {len(chosen)} of {len(found)} pairs", file=sys.stderr)
    return file


def compare(model: Path, files: dict[str, Path], seed: int, steps: int, episodes: int) -> dict[str, list[float]]:
    """The scores of the starts on each package that is new, before and after adapting."""
    loaded = load_model(model, "embedding")
    sets = lengthen_for(loaded, [read_examples(file, loaded, window=WINDOW) for file in files.values()])
    named = dict(zip(files, sets, strict=True))
    seen = join([named[name] for name in SEEN], [None] * len(SEEN))
    training = Episodes(seen, None, SHOTS, QUERIES, seed=seed)
    tests = {name: _episodes(named[name], seed) for name in UNSEEN}
    plain = build_loss(loaded.model, "embedding", ALGORITHMS["fomaml"], BEFORE)
    start = {name: x.detach().clone() for name, x in plain.start().items()}
    whole = TASKS * (SHOTS + QUERIES)
    joint = Options(steps=steps, batch_size=whole, learning_rate=2e-5, warmup=0.1, accumulate=4, seed=seed)
    starts: dict[str, Any] = {
        "the model": lambda: start,
        "joint": lambda: joint_start(loaded.model, start, seen, "embedding", joint, by_classes=False),
        **{name: lambda name=name: _learn(name, model, training, steps, seed) for name in HOW},
    }
    found = dict[str, list[float]]()
    for name, make in starts.items():
        began = time.monotonic()
        at = make()
        made, found[name] = time.monotonic() - began, []
        for test in tests.values():
            for cells in ([BEFORE], GRID):
                score = evaluate(plain, at, test, cells, episodes, at_once=1)
                found[name].append(100 * score.mean)
        shown = ", ".join(f"{x:.1f}" for x in found[name])
        print(
            f"# seed {seed}: {name} {shown}; {score.steps} steps at {score.rate}; {made:.0f} and "
            f"{time.monotonic() - began - made:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return found


def _episodes(examples: Examples, seed: int) -> Episodes:
    return Episodes(join([examples], [None]), None, SHOTS, QUERIES, seed=seed + 1000)


def _learn(name: str, model: Path, training: Episodes, steps: int, seed: int) -> dict[str, Tensor]:
    """A start by an algorithm."""
    loaded, (inner, settings) = load_model(model, "embedding"), HOW[name]
    loss: MetaLoss = build_loss(loaded.model, "embedding", ALGORITHMS[name], inner)
    fit(loaded.model, training, loss, Options(steps=steps, batch_size=TASKS, seed=seed, **settings))
    return {each: x.detach() for each, x in loss.start().items()}


def main() -> None:
    """Run the comparison, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--episodes", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        subprocess.run([sys.executable, str(MAKE), place], check=True, stdout=sys.stderr)
        files = {name: write_pairs(folder, name) for name in (*SEEN, *UNSEEN)}
        runs = [compare(folder / "base", files, seed, options.steps, options.episodes) for seed in range(options.seeds)]
    print(f"| start | {' | '.join(f'{name} | adapted' for name in UNSEEN)} |\n|---|--:|--:|--:|--:|")
    for name in runs[0]:
        columns = zip(*(run[name] for run in runs), strict=True)
        print(f"| {name} | {' | '.join('{:.1f} ± {:.1f}'.format(*spread(column)) for column in columns)} |")


if __name__ == "__main__":
    main()
