"""Sinusoids of 10 shots: starts from meta-learning, beside a random one and joint training, over several seeds.

    python benchmarks/meta_sinusoids.py                      # three seeds, a quarter of an hour on one core
    python benchmarks/meta_sinusoids.py --steps 5 --seeds 1  # a smoke test

A task is a sinusoid of amplitude 0.1 to 5 and phase 0 to pi on [-5, 5]; a network with two hidden layers of 40 units
learns it from 10 points. Numbers are the mean squared error on other points after so many steps of plain descent, over
600 new sinusoids; each start has the rate of the same grid that is best for it at 10 steps on 200 others. Source: Finn
et al. 2017, arXiv 1703.03400, section 5.1. With --plot FILE the curves as an image.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from seeds import spread
from torch import Tensor, nn

from mergekit_lfm.meta.algorithms import build_loss
from mergekit_lfm.meta.episodes import DrawnEpisodes, Episode
from mergekit_lfm.meta.evaluate import score_cells
from mergekit_lfm.meta.losses import Inner, MetaLoss
from mergekit_lfm.recipe.meta_algorithms import ALGORITHMS
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.train.examples import Batch
from mergekit_lfm.train.loop import fit
from mergekit_lfm.train.losses import Terms, squares

SHOTS, TASKS, TESTED, CHOSEN = 10, 25, 600, 200
STEPS, RATES = (0, 1, 5, 10, 32), (0.003, 0.005, 0.01, 0.02, 0.04)
# The outer steps in thousandths of --steps, the inner steps and rate, and the settings of the optimizer.
HOW: Mapping[str, tuple[float, Inner, dict[str, object]]] = {
    "maml": (1.0, Inner(1, 0.01), {"learning_rate": 1e-3, "schedule": "constant"}),
    "fomaml": (1.0, Inner(1, 0.01), {"learning_rate": 1e-3, "schedule": "constant"}),
    "reptile": (0.4, Inner(32, 0.02), {"learning_rate": 1.0, "optimizer": "sgd", "schedule": "linear", "clip": 0.0}),
}


class Net(nn.Module):
    """A network from numbers [n, 1] to numbers [n, 1], with two hidden layers of 40 units."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The outputs."""
        y: Tensor = self.layers(x)
        return y


def draw_sinusoid(generator: torch.Generator) -> Episode:
    """A sinusoid: points to learn it from, and as many others."""
    amplitude, phase = torch.rand(2, generator=generator) * torch.tensor([4.9, math.pi]) + torch.tensor([0.1, 0.0])
    x = torch.rand(2 * SHOTS, 1, generator=generator) * 10 - 5
    y = amplitude * (x - phase).sin()
    first, second = ({"x": x[part], "labels": y[part]} for part in (slice(SHOTS), slice(SHOTS, None)))
    return Episode(first, second)


def jointly(model: nn.Module, batch: Batch) -> Terms:
    """The loss of one network on all points of all tasks."""
    whole = {name: batch[f"query/{name}"].flatten(0, 1) for name in ("x", "labels")}
    return squares(model, whole)


def new_net(seed: int) -> Net:
    """A network with random weights."""
    torch.manual_seed(seed)
    return Net()


def curve(loss: MetaLoss, seed: int) -> dict[int, float]:
    """The error after each number of steps, at the rate that is best for 10."""
    start = loss.start()
    episodes = DrawnEpisodes(draw_sinusoid, seed=1000 + seed)
    tried = score_cells(loss, start, episodes, range(CHOSEN), [Inner(10, rate) for rate in RATES])
    rate = min(tried, key=lambda cell: float(tried[cell].mean().nan_to_num(torch.inf))).rate
    cells = [Inner(count, rate) for count in STEPS]
    scores = score_cells(loss, start, episodes, range(CHOSEN, CHOSEN + TESTED), cells)
    return {cell.steps: float(scores[cell].mean()) for cell in cells}


def compare(seed: int, steps: int) -> dict[str, dict[int, float]]:
    """The errors of one seed, by the name of the start."""
    plain = replace(ALGORITHMS["maml"], name="plain")
    found = {"random": curve(build_loss(new_net(seed), "regression", plain, Inner(1, 0.01)), seed)}
    training = DrawnEpisodes(draw_sinusoid, seed=seed)
    joint = new_net(seed)
    fit(joint, training, jointly, Options(steps=steps, batch_size=TASKS, learning_rate=1e-3, schedule="constant"))
    found["joint"] = curve(build_loss(joint, "regression", plain, Inner(1, 0.01)), seed)
    for name, (share, inner, settings) in HOW.items():
        net = new_net(seed)
        loss = build_loss(net, "regression", ALGORITHMS[name], inner)
        options = Options(steps=max(1, round(share * steps)), batch_size=TASKS, **settings)  # type: ignore[arg-type]
        fit(net, training, loss, options)
        found[name] = curve(loss, seed)
    return found


def draw_plot(file: Path, found: Sequence[Mapping[str, Mapping[int, float]]]) -> None:
    """The mean curves over seeds, as an image."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in found[0]:
        means = [sum(each[name][count] for each in found) / len(found) for count in STEPS]
        axis.plot(STEPS, means, marker="o", label=name)
    axis.set(xlabel="steps of plain descent on 10 points", ylabel="mean squared error", yscale="log", xscale="symlog")
    axis.set_xticks(STEPS, [str(count) for count in STEPS])
    axis.set_xlim(left=-0.1)
    axis.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    axis.minorticks_off()
    axis.legend(frameon=False)
    figure.savefig(file, dpi=120)


def main() -> None:
    """Run the comparison, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [compare(seed, options.steps) for seed in range(options.seeds)]
    print("| start | " + " | ".join(f"{count} steps" for count in STEPS) + " |")
    print("|---|" + "--:|" * len(STEPS))
    for name in found[0]:
        columns = [[each[name][count] for each in found] for count in STEPS]
        shown = ["{:.2f} ± {:.2f}".format(*spread(column)) for column in columns]
        print(f"| {name} | " + " | ".join(shown) + " |")
    if options.plot is not None:
        draw_plot(options.plot, found)


if __name__ == "__main__":
    main()
