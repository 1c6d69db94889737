"""Few-shot digits: initialisations from meta-learning beside a random one and joint training, over several seeds.

    python benchmarks/meta_digits.py                      # three seeds, two hours on one core
    python benchmarks/meta_digits.py --side 8 --shots 1 --rows maml reptile  # images that fill the canvas
    python benchmarks/meta_digits.py --steps 5 --seeds 1  # a smoke test

Classes are scikit-learn's digits, of 8 x 8 pixels, each at a random place of a canvas of 10 x 10, in four rotations,
but 0, 1, 6, 8 and 9 in two, as a half turn makes them, or one of the others, again. The classes of two of the other
digits are for the test. A task is five classes. A network of three convolutions adapts to one or five images of each by
plain descent. Numbers are accuracy in percent on 15 other images of each class, over 100 episodes: each start in the
cell of one grid of rates and steps that is best for it on 100 other episodes. Prototypes and relations have no grid,
nor have learned steps. Means over seeds, with standard errors.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from seeds import spread
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mergekit_lfm.meta.algorithms import build_loss
from mergekit_lfm.meta.baselines import head_names, joint_start
from mergekit_lfm.meta.episodes import Episodes
from mergekit_lfm.meta.evaluate import evaluate
from mergekit_lfm.meta.losses import Inner
from mergekit_lfm.recipe.meta_algorithms import ALGORITHMS
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.train.examples import Examples
from mergekit_lfm.train.loop import fit

WAYS, QUERIES, TESTED = 5, 15, 100
SIDE = 10  # of the canvas
GRID = [Inner(count, rate) for rate in (0.01, 0.03, 0.1, 0.2, 0.4) for count in (1, 3, 10, 30)]
TASKS = 4  # of an outer step
HALF = (0, 1, 6, 8, 9)  # digits with two rotations
INNER = Inner(5, 0.1)
ADAM: Mapping[str, Any] = {"learning_rate": 5e-3, "schedule": "cosine"}
# The inner steps, and the settings of the optimizer, of algorithms that differ from the others.
HOW: Mapping[str, tuple[Inner, Mapping[str, Any]]] = {
    "reptile": (Inner(10, 0.3), {"learning_rate": 1.0, "optimizer": "sgd", "schedule": "linear", "clip": 0.0}),
    "relation": (INNER, {**ADAM, "learning_rate": 1e-3}),
    "mgml": (INNER, {"learning_rate": 1.0, "optimizer": "sgd", "schedule": "constant", "clip": 0.0}),
}
# Algorithms for such tasks.
ROWS = [
    name
    for name, row in ALGORITHMS.items()
    if row.kind not in ("edits", "stream") and not row.named and not row.crosses
]
OPTIONS: Mapping[str, Mapping[str, Any]] = {"mgml": {"group_rate": 0.5}}
SHARES = {"meta_lstm": 4, "mgml": 2}  # of the steps, where each is more work


class Net(nn.Module):
    """A classifier of images [n, 1, 10, 10]: three convolutions, two with pooling, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, WAYS),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The scores of classes."""
        scores: Tensor = self.layers(x)
        return scores


def two_that_differ(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Eight digits to learn, and two for the test, whose four rotations differ."""
    unseen = random.choice([*{*range(10)} - {*HALF}], 2, replace=False)
    return np.setdiff1d(np.arange(10), unseen), unseen


def rotated_digits(
    seed: int, split: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]] = two_that_differ, side: int = SIDE
) -> tuple[Examples, Examples]:
    """The images of digits to learn in their rotations, each a class, and of digits for the test."""
    data = load_digits()
    random = np.random.default_rng(seed)
    images, (seen, unseen) = (data.images / 16).astype(np.float32), split(random)

    def placed(image: np.ndarray) -> np.ndarray:
        top, left = random.integers(0, side - 7, 2)
        canvas = np.zeros((1, side, side), np.float32)
        canvas[0, top : top + 8, left : left + 8] = image
        return canvas

    def classes(digits: np.ndarray) -> Examples:
        items = list[dict[str, Tensor]]()
        for turn in range(4):
            for place, digit in enumerate(digits):
                if turn > 1 and digit in HALF:
                    continue
                label = torch.tensor(turn * len(digits) + place)
                own = np.rot90(images[data.target == digit], turn, axes=(1, 2))
                items += [{"x": torch.from_numpy(placed(x)), "labels": label} for x in own]
        return Examples(items)

    return classes(seen), classes(unseen)


def new_net(seed: int) -> Net:
    """A network with random weights."""
    torch.manual_seed(seed)
    return Net()


def compare(seed: int, shots: int, steps: int, rows: Sequence[str], side: int) -> dict[str, float]:
    """The accuracies of one seed, by the name of the start."""
    seen, unseen = rotated_digits(seed, side=side)
    training = Episodes(seen, WAYS, shots, QUERIES, seed=seed)
    test = Episodes(unseen, WAYS, shots, QUERIES, seed=seed + 1000)
    found = dict[str, float]()

    def note(name: str, began: float, score: Any) -> None:
        found[name] = 100 * score.mean
        cell = "" if score.rate is None else f"{score.steps} steps at {score.rate}"
        print(
            f"# seed {seed}, {shots} shots: {name} {found[name]:.1f}, {cell}, {time.monotonic() - began:.0f} s",
            file=sys.stderr,
        )

    plain = build_loss(new_net(seed), "classification", replace(ALGORITHMS["maml"], first_order=True), Inner(1, 0.1))
    start = {name: x.detach().clone() for name, x in plain.start().items()}
    began = time.monotonic()
    note("random", began, evaluate(plain, start, test, GRID, TESTED))
    ordinary = Options(steps=steps, batch_size=128, learning_rate=2e-3, schedule="cosine", seed=seed)
    began = time.monotonic()
    joint = joint_start(plain.model, start, seen, "classification", ordinary, by_classes=True)
    note("joint", began, evaluate(plain, joint, test, GRID, TESTED))
    for name in rows:
        row = ALGORITHMS[name]
        net = new_net(seed)
        if row.scales:
            net.load_state_dict(joint)
        inner, settings = HOW.get(name, (INNER, ADAM))
        began = time.monotonic()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            head = head_names(net) if row.head_only else frozenset[str]()
            loss = build_loss(net, "classification", row, inner, head, OPTIONS.get(name, {}))
        episodes = replace(training, hardness=loss.watch(training.classes)) if row.hard_tasks else training
        own = max(1, steps // SHARES.get(name, 1))
        fit(net, episodes, loss, Options(steps=own, batch_size=TASKS, seed=seed, **settings))
        cells = GRID
        if not row.adapts:
            cells = [Inner(0, 0.0)]
        elif row.learns_steps:
            cells = [loss.inner]
        elif row.learns_rates:
            cells = [Inner(count, None) for count in (1, 3, 10, 30)]
        note(name, began, evaluate(loss, loss.start(), test, cells, TESTED))
    return found


def main() -> None:
    """Run the comparison, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument(
        "--rows", nargs="+", default=ROWS, help="algorithms to compare with the random and joint starts"
    )
    parser.add_argument("--side", type=int, default=SIDE, choices=(8, SIDE), help="pixels of the canvas, each way")
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = {
        shots: [compare(seed, shots, options.steps, options.rows, options.side) for seed in range(options.seeds)]
        for shots in options.shots
    }
    heads = " | ".join(f"{shots} shot{'s' * (shots > 1)}" for shots in columns)
    print(f"| start | {heads} |\n|---|{'--:|' * len(columns)}")
    for name in next(iter(columns.values()))[0]:
        shown = ["{:.1f} ± {:.1f}".format(*spread([each[name] for each in own])) for own in columns.values()]
        print(f"| {name} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
