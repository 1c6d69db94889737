"""Judge merges of five conflicting fine-tunes: digits in five views, small perceptrons from one base.

    python benchmarks/digits_multitask.py                    # two widths, three seeds: about a minute on one core
    python benchmarks/digits_multitask.py --quick            # a smoke test

Models, statistics and merges are files, made by the package's own functions as a user does it. A number is the accuracy
in percent, averaged over the test sets of the five views and then over the seeds; brackets hold the lowest and the
highest of the seeds. "best lambda" is the best of a grid for each width and seed, chosen on the test sets: this favours
these rows, since a user has to choose without the test sets. The other rows have no such choice. TIES and DARE keep the
share of every change that their papers keep, 0.2 and 0.1.
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
    """A recipe that merges the fine-tunes in `folder`; kind: of their statistics, None for methods without."""
    models = [{"model": str(folder / name)} for name in VIEWS]
    if kind:
        models = [entry | {"stats": f"{entry['model']}.{kind}.safetensors"} for entry in models]
    return {"merge_method": method, "models": models, "parameters": dict(parameters)}


def make_recipes(folder: Path, lambdas: Sequence[float]) -> dict[str, list[Recipe]]:
    """The merges of each row of the table; a row with several shows the best of them."""
    base = {"base_model": str(folder / "base")}

    def scaled(method: str, **parameters: object) -> list[Recipe]:
        return [base | fused(folder, method, parameters | {"weight": 1.0, "lambda": x}) for x in lambdas]

    return {
        "average": [fused(folder, "linear", {"weight": 1.0})],
        "task arithmetic, best lambda": scaled("task_arithmetic"),
        "TIES, best lambda": scaled("ties", density=0.2),
        "DARE, best lambda": scaled("dare_linear", density=0.1, rescale="density"),
        "TSV-M, best lambda": scaled("tsv"),
        "Iso-C, best lambda": scaled("iso_c"),
        "Fisher": [fused(folder, "fisher", {}, "fisher")],
        "RegMean, alpha 1": [fused(folder, "regmean", {"alpha": 1.0}, "gram")],
        "RegMean, alpha 0.9": [fused(folder, "regmean", {"alpha": 0.9}, "gram")],
    }


def measure(folder: Path, width: int, seed: int, lambdas: Sequence[float]) -> dict[str, float]:
    """The accuracy of every row's model, in percent, averaged over the tasks. Leaves the models in `folder`."""
    tasks = make_tasks(seed)
    make_digits(folder, width=width, seed=seed)
    everything = tuned(load(folder / "base"), together(task.train for task in tasks.values()), seed)
    save(everything, folder / "everything")
    accuracies = {"base": mean_accuracy(folder / "base", tasks)}
    accuracies["fine-tunes, each on its own task"] = statistics.mean(
        judge(load(folder / name), {name: task})[name] for name, task in tasks.items()
    )
    for row, recipes in make_recipes(folder, lambdas).items():
        outs = [folder / f"{row} {i}" for i in range(len(recipes))]
        for recipe, out in zip(recipes, outs, strict=True):
            merge(recipe, out, threads=1)
        accuracies[row] = max(mean_accuracy(out, tasks) for out in outs)
    return accuracies | {"trained on all tasks": mean_accuracy(folder / "everything", tasks)}


def mean_accuracy(folder: Path, tasks: Mapping[str, Task]) -> float:
    return statistics.mean(judge(load(folder), tasks).values())


def run(widths: Sequence[int], seeds: Sequence[int], lambdas: Sequence[float]) -> dict[int, dict[str, list[float]]]:
    """Every row's accuracies, one for each seed, by width."""
    numbers: dict[int, dict[str, list[float]]] = {}
    for width in widths:
        with tempfile.TemporaryDirectory(prefix="digits_multitask_") as work:
            measured = [measure(Path(work) / f"seed_{seed}", width, seed, lambdas) for seed in seeds]
        numbers[width] = {row: [each[row] for each in measured] for row in measured[0]}
    return numbers


def table(numbers: Mapping[int, Mapping[str, Sequence[float]]]) -> str:
    """The accuracies as Markdown: mean (least to most) of the seeds."""
    lines = [f"| | {' | '.join(f'width {width}' for width in numbers)} |", "|---|" + "--:|" * len(numbers)]
    for row in next(iter(numbers.values())):
        seeds = [rows[row] for rows in numbers.values()]
        cells = [f"{statistics.mean(x):.1f} ({min(x):.1f}-{max(x):.1f})" for x in seeds]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train, collect, merge and judge; print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--widths", type=int, nargs="+", default=WIDTHS, help="units of the hidden layers [default: 64 256]"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="[default: 0 1 2]")
    parser.add_argument("--quick", action="store_true", help="one seed, width 64, three values of lambda")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    numbers = run((64,), (0,), LAMBDAS[1::4]) if arguments.quick else run(arguments.widths, arguments.seeds, LAMBDAS)
    print(
        f"mergekit_lfm {__version__}, {platform.machine()}, Python {platform.python_version()}, "
        f"torch {version('torch')}, scikit-learn {version('scikit-learn')}; "
        f"mean (least-most) of {1 if arguments.quick else len(arguments.seeds)} seeds\n"
    )
    print(table(numbers))


if __name__ == "__main__":
    main()
