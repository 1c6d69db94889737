"""Judge the average of two perceptrons that share only their data, before and after alignment, on digits.

    python benchmarks/digits_alignment.py                    # three widths, three pairs: a few minutes on one core
    python benchmarks/digits_alignment.py --quick            # a smoke test

The two models of a pair differ in their start and in the order of the images. A number is the accuracy on held-out
images in percent, averaged over the pairs; brackets hold the lowest and the highest. The barrier is that of the loss,
in nats, at the worst of 11 points on the line. The second model is rewritten, the first stays; statistics and repair
use the training images. No choice depends on the held-out images.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergekit_lfm import merge
from mergekit_lfm.align.find import find_transform
from mergekit_lfm.arch import Symmetries, Units, read_table
from mergekit_lfm.artifacts.transform import Transform
from mergekit_lfm.collect.run import collect
from mergekit_lfm.judge.barrier import barrier
from mergekit_lfm.judge.evaluate import accuracy
from mergekit_lfm.repair import repair_module
from mergekit_lfm.version import __version__
from mergekit_lfm.views.rewritten import rewrite

sys.path.append(str(Path(__file__).parents[1] / "recipes" / "make"))
from digits import Examples, make_upright, train

WIDTHS, PAIRS = (32, 128, 512), (0, 1, 2)
EPOCHS, RATE = 60, 1e-3
LAYERS = 4  # 64 inputs, three hidden layers, 10 classes

# Layers as nn.Sequential names them: ReLU has the odd numbers.
TABLE = """
0.weight hidden.0 input
0.bias   hidden.0
2.weight hidden.1 hidden.0'
2.bias   hidden.1
4.weight hidden.2 hidden.1'
4.bias   hidden.2
6.weight class    hidden.2'
6.bias   class
"""


def perceptron(width: int) -> nn.Sequential:
    """64 inputs, three hidden layers with ReLU, 10 logits."""
    sizes = (64, *[width] * (LAYERS - 1), 10)
    layers = [layer for one, two in pairwise(sizes) for layer in (nn.Linear(one, two), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def make_symmetries(width: int) -> Symmetries:
    """The table of the perceptron: hidden units take any order, and ReLU lets positive factors through."""
    groups = {f"hidden.{i}": Units(width, "positive") for i in range(LAYERS - 1)}
    return read_table(TABLE, groups, [])


def make_split(seed: int) -> tuple[Examples, Examples]:
    """The training and the held-out images; the seed divides them."""
    task = make_upright(seed)
    return task.train, task.test


def trained(examples: Examples, width: int, seed: int, epochs: int = EPOCHS) -> nn.Sequential:
    """A trained perceptron; its start and the order of the examples come from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = perceptron(width)
    train(model, examples, epochs=epochs, rate=RATE, seed=seed)
    return model.eval()


def holding(tensors: Mapping[str, Tensor]) -> nn.Sequential:
    """The perceptron with these tensors."""
    model = perceptron(len(tensors["0.bias"]))
    model.load_state_dict(dict(tensors))
    return model.eval()


def mean_of(one: nn.Module, other: nn.Module) -> nn.Sequential:
    """The perceptron half way between two."""
    first, second = one.state_dict(), other.state_dict()
    return holding({name: (x + second[name]) / 2 for name, x in first.items()})


def aligned(model: nn.Module, transform: Transform) -> nn.Sequential:
    """The model as the transform rewrites it."""
    return holding(rewrite(model.state_dict(), transform))


def regmean(folder: Path, ends: Sequence[nn.Module], images: Examples) -> nn.Sequential:
    """The ends merged by RegMean, through files as a user does it."""
    for i, end in enumerate(ends):
        (folder / f"{i}").mkdir(parents=True)
        save_file(end.state_dict(), folder / f"{i}" / "model.safetensors", {"format": "pt"})
        collect("gram", end, [images], folder / f"{i}.gram.safetensors", checkpoint=folder / f"{i}")
    models = [{"model": str(folder / f"{i}"), "stats": str(folder / f"{i}.gram.safetensors")} for i in range(len(ends))]
    merge({"merge_method": "regmean", "models": models}, folder / "merged", threads=1)
    return holding(load_file(folder / "merged" / "model.safetensors"))


def ensemble(one: nn.Module, other: nn.Module) -> nn.Module:
    """The logarithm of the mean of both models' probabilities."""

    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([model(x).softmax(-1) for model in (one, other)]).mean(0).log()

    return Both()


def repaired(merged: nn.Module, ends: Sequence[nn.Module], images: Examples) -> nn.Module:
    repair_module(merged, ends, [images])
    return merged


def measure(folder: Path, width: int, pair: int, epochs: int = EPOCHS) -> dict[str, float]:
    """Every row's number: accuracies in percent, and barriers of the loss in nats. Leaves files in `folder`."""
    images, held_out = make_split(pair)
    one, other = (trained(images, width, 2 * pair + i, epochs) for i in range(2))
    cross = collect("cross", one, [images], folder / "cross.safetensors", other=other)
    table = make_symmetries(width)
    source, to = other.state_dict(), one.state_dict()
    transforms = {
        "weight matching": find_transform(source, to, "weight_matching", symmetries=table),
        "activation matching": find_transform(source, to, "activation_matching", symmetries=table, statistics=cross),
        "OT by activations": find_transform(source, to, "ot", symmetries=table, statistics=cross),
    }
    others = {name: aligned(other, transform) for name, transform in transforms.items()}
    weights, activations = others["weight matching"], others["activation matching"]
    models: dict[str, nn.Module] = {
        "ensemble of both": ensemble(one, other),
        "average": mean_of(one, other),
        **{name: mean_of(one, rewritten) for name, rewritten in others.items()},
        "average + REPAIR": repaired(mean_of(one, other), [one, other], images),
        "weight matching + REPAIR": repaired(mean_of(one, weights), [one, weights], images),
        "activation matching + RegMean": regmean(folder / "regmean", [one, activations], images),
    }
    ends = [100 * accuracy(model, [held_out]).accuracy for model in (one, other)]
    numbers = {"the two models": statistics.mean(ends)}
    numbers |= {name: 100 * accuracy(model, [held_out]).accuracy for name, model in models.items()}
    for name, rewriting in {"average": None, **transforms}.items():
        line = barrier(one, other, [held_out], task="classification", transform=rewriting)
        numbers[f"barrier: {name}"] = line.loss_barrier.height
    return numbers


def run(widths: Sequence[int], pairs: Sequence[int], epochs: int = EPOCHS) -> dict[int, dict[str, list[float]]]:
    """Every row's numbers, one for each pair, by width."""
    numbers: dict[int, dict[str, list[float]]] = {}
    for width in widths:
        measured = []
        for pair in pairs:
            with tempfile.TemporaryDirectory(prefix="digits_alignment_") as work:
                measured.append(measure(Path(work), width, pair, epochs))
            print(f"width {width}, pair {pair}", file=sys.stderr, flush=True)
        numbers[width] = {row: [each[row] for each in measured] for row in measured[0]}
    return numbers


def table_of(numbers: Mapping[int, Mapping[str, Sequence[float]]]) -> str:
    """The numbers as Markdown: mean (least to most) of the pairs."""
    lines = [f"| | {' | '.join(f'width {width}' for width in numbers)} |", "|---|" + "--:|" * len(numbers)]
    for row in next(iter(numbers.values())):
        form = ".3f" if row.startswith("barrier") else ".1f"
        pairs = [rows[row] for rows in numbers.values()]
        cells = [f"{statistics.mean(x):{form}} ({min(x):{form}}-{max(x):{form}})" for x in pairs]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train, align, merge and judge; print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="[default: 32 128 512]")
    parser.add_argument("--pairs", type=int, nargs="+", default=PAIRS, help="their seeds [default: 0 1 2]")
    parser.add_argument("--quick", action="store_true", help="one pair, width 32, 10 epochs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    numbers = run((32,), (0,), 10) if arguments.quick else run(arguments.widths, arguments.pairs)
    print(
        f"mergekit_lfm {__version__}, {platform.machine()}, Python {platform.python_version()}, "
        f"torch {version('torch')}, scikit-learn {version('scikit-learn')}; "
        f"mean (least-most) of {1 if arguments.quick else len(arguments.pairs)} pairs\n"
    )
    print(table_of(numbers))


if __name__ == "__main__":
    main()
