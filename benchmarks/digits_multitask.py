"""What merges of five conflicting fine-tunes are worth: digits in five views, small perceptrons from one base.

    python benchmarks/digits_multitask.py                    # two widths, three seeds: about a minute on one core
    python benchmarks/digits_multitask.py --quick            # a smoke test

Models, statistics and merges are files, made by the package's own functions as a user would. A number is the accuracy
in percent, averaged over the test sets of the five views and then over the seeds; in brackets the least and the most of
the seeds. "best lambda" is the best of a grid for each width and seed, chosen on the test sets: that favours these
rows, a user would have to choose without them. Nothing is chosen for the others. TIES and DARE keep the part of every
change that their papers keep, 0.2 and 0.1.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mergekit_lfm import merge
from mergekit_lfm.version import __version__

sys.path.append(str(Path(__file__).parents[1] / "recipes" / "make"))
from digits import VIEWS, Task, judge, load, make_digits, make_tasks, save, together, tuned

Recipe = dict[str, Any]
LAMBDAS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
WIDTHS, SEEDS = (64, 256), (0, 1, 2)


def fused(folder: Path, method: str, parameters: Mapping[str, object], kind: str | None = None) -> Recipe:
    """A recipe that merges the fine-tunes in folder, with their statistics of a kind where the method takes some."""
    models = [{"model": str(folder / name)} for name in VIEWS]
    if kind:
        models = [entry | {"stats": f"{entry['model']}.{kind}.safetensors"} for entry in models]
    return {"merge_method": method, "models": models, "parameters": dict(parameters)}


def make_recipes(folder: Path, lambdas: Sequence[float]) -> dict[str, list[Recipe]]:
    """The merges by the table's rows; where a row has several, the best of them is its number."""
    base = {"base_model": str(folder / "base")}

    def scaled(method: str, **parameters: object) -> list[Recipe]:
        return [base | fused(folder, method, parameters | {"weight": 1.0, "lambda": x}) for x in lambdas]

    return {
        "average": [fused(folder, "linear", {"weight": 1.0})],
        "task arithmetic, best lambda": scaled("task_arithmetic"),
        "TIES, best lambda": scaled("ties", density=0.2),
        "DARE, best lambda": scaled("dare_linear", density=0.1, rescale="density"),
        "Fisher": [fused(folder, "fisher", {}, "fisher")],
        "RegMean, alpha 1": [fused(folder, "regmean", {"alpha": 1.0}, "gram")],
        "RegMean, alpha 0.9": [fused(folder, "regmean", {"alpha": 0.9}, "gram")],
    }


def measure(folder: Path, width: int, seed: int, lambdas: Sequence[float]) -> dict[str, float]:
    """The accuracy of every row's model, in percent, averaged over the tasks. The models are left in folder."""
    tasks = make_tasks(seed)
    make_digits(folder, width=width, seed=seed)
    everything = tuned(load(folder / "base"), together(task.train for task in tasks.values()), seed)
    save(everything, folder / "everything")
    found = {"base": mean_accuracy(folder / "base", tasks)}
    found["fine-tunes, each on its own task"] = statistics.mean(
        judge(load(folder / name), {name: task})[name] for name, task in tasks.items()
    )
    for row, recipes in make_recipes(folder, lambdas).items():
        outs = [Path(merge(recipe, folder / f"{row} {i}", threads=1)) for i, recipe in enumerate(recipes)]
        found[row] = max(mean_accuracy(out, tasks) for out in outs)
    return found | {"trained on all tasks": mean_accuracy(folder / "everything", tasks)}


def mean_accuracy(folder: Path, tasks: Mapping[str, Task]) -> float:
    return statistics.mean(judge(load(folder), tasks).values())


def run(widths: Sequence[int], seeds: Sequence[int], lambdas: Sequence[float]) -> dict[int, dict[str, list[float]]]:
    """Every row's accuracies, one for each seed, by width."""
    found: dict[int, dict[str, list[float]]] = {}
    for width in widths:
        with tempfile.TemporaryDirectory(prefix="digits_multitask_") as work:
            measured = [measure(Path(work) / f"seed_{seed}", width, seed, lambdas) for seed in seeds]
        found[width] = {row: [each[row] for each in measured] for row in measured[0]}
    return found


def table(found: Mapping[int, Mapping[str, Sequence[float]]]) -> str:
    """The accuracies as Markdown: mean (least to most) of the seeds."""
    lines = [f"| | {' | '.join(f'width {width}' for width in found)} |", "|---|" + "--:|" * len(found)]
    for row in next(iter(found.values())):
        seeds = [rows[row] for rows in found.values()]
        cells = [f"{statistics.mean(x):.1f} ({min(x):.1f}-{max(x):.1f})" for x in seeds]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train, collect, merge and judge; print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="of the hidden layers [default: 64 256]")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="[default: 0 1 2]")
    parser.add_argument("--quick", action="store_true", help="one seed, width 64, three values of lambda")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = run((64,), (0,), LAMBDAS[1::4]) if given.quick else run(given.widths, given.seeds, LAMBDAS)
    print(
        f"mergekit_lfm {__version__}, {platform.machine()}, Python {platform.python_version()}, "
        f"torch {version('torch')}, scikit-learn {version('scikit-learn')}; "
        f"mean (least-most) of {1 if given.quick else len(given.seeds)} seeds\n"
    )
    print(table(found))


if __name__ == "__main__":
    main()
