#!/usr/bin/env python3
"""Judge the alignment of one tiny Llama to another with a different start: the barrier between them by each method.

    python benchmarks/llama_alignment.py llamas                # trains two models a seed: 15 minutes on one core
    python benchmarks/llama_alignment.py llamas --plot docs/llama_barrier.png

Prints the table of docs/alignment.md: by how much the worst point on the line between the two is worse than what lies
between their losses, in nats a character of held-out text. The models are those of recipes/make/llamas.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers.utils import logging

sys.path.append(str(Path(__file__).parents[1] / "recipes" / "make"))
from llamas import STEPS, make_llamas

from mergekit_lfm.align.find import find_transform
from mergekit_lfm.artifacts.transform import Transform
from mergekit_lfm.collect.run import collect
from mergekit_lfm.commands.show.plots import plot_lines
from mergekit_lfm.judge.barrier import Interpolation, barrier

SEEDS = (0, 1, 2)
# How the second model is rewritten: a method, and whether it uses activations.
METHODS = {
    "permutations, by weights": ("weight_matching", False),
    "permutations, by activations": ("activation_matching", True),
    "rotations, by weights": ("rotation", False),
    "rotations, by activations": ("rotation", True),
}
NAIVE = "as they are"


def transforms(folder: Path) -> dict[str, Transform | None]:
    """Each method's transform of folder/b that brings it near folder/a."""
    a, b, file = folder / "a", folder / "b", folder / "ab.cross.safetensors"
    statistics = collect("cross", a, folder / "sample.txt", file, task="lm", other=b, window=128)
    found: dict[str, Transform | None] = {NAIVE: None}
    for label, (method, looks) in METHODS.items():
        found[label] = find_transform(b, a, method, statistics=statistics if looks else None)
    return found


def lines(folder: Path, points: int = 11) -> dict[str, Interpolation]:
    """The line from folder/a to folder/b, as it is and with folder/b as each method rewrites it."""
    return {
        label: barrier(folder / "a", folder / "b", folder / "held_out.txt", task="lm", points=points, transform=each)
        for label, each in transforms(folder).items()
    }


def heights(pairs: Sequence[Mapping[str, Interpolation]]) -> dict[str, list[float]]:
    """The barriers of the loss by label, one for each pair."""
    return {label: [pair[label].loss_barrier.height for pair in pairs] for label in pairs[0]}


def table(pairs: Sequence[Mapping[str, Interpolation]], seeds: Sequence[int]) -> str:
    """The barriers of every pair and their means, in Markdown."""
    rows = [
        "| `b` | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |",
        "|---|" + "--:|" * (len(seeds) + 1),
    ]
    for label, values in heights(pairs).items():
        rows.append(f"| {label} | " + " | ".join(f"{v:.2f}" for v in (*values, sum(values) / len(values))) + " |")
    ends = [[pair[NAIVE].points[i].loss for i in (0, -1)] for pair in pairs]
    text = ", ".join(f"{a:.3f} and {b:.3f}" for a, b in ends)
    return "\n".join([*rows, "", f"Losses of the models themselves: {text}."])


def main() -> None:
    """Train missing models, align, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the models; existing ones are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="[default: 0 1 2]")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of training [default: {STEPS}]")
    parser.add_argument("--plot", type=Path, help="draw the lines of the first seed into this PNG")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    pairs = []
    for seed in arguments.seeds:
        make_llamas(arguments.out / f"seed{seed}", seed=seed, steps=arguments.steps)
        pairs.append(lines(arguments.out / f"seed{seed}"))
        print(f"seed {seed}: " + ", ".join(f"{name} {v[0]:.3f}" for name, v in heights(pairs[-1:]).items()), flush=True)
    print("\n" + table(pairs, arguments.seeds))
    if arguments.plot:
        plot_lines(pairs[0], arguments.plot, ends=("a", "b"), loss="loss (nats a character)")


if __name__ == "__main__":
    main()
