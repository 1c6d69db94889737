"""How much of its pictures does a fine-tune's difference give away? Small networks, scikit-learn's digits.

    python benchmarks/leakage.py             # three seeds, some minutes on one core

A network of random weights takes steps of plain descent on a few digits; `audit` is given the difference as if it had
been one step. A number is the correlation of the true images with the ones found for their classes, the mean over
images and seeds, with its standard error. Adam's difference is that of one step with Adam in place of plain descent.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
from seeds import print_spreads
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mergekit_lfm.distill.generators import build
from mergekit_lfm.distill.invert import Inversion
from mergekit_lfm.distill.leakage import as_gradient, audit, correlation

SHAPE, RATE = (1, 8, 8), 0.1
# name: images, steps, smooth activations, Adam
CASES = {
    "1 image, 1 step, sigmoids": (1, 1, True, False),
    "1 image, 1 step, ReLU": (1, 1, False, False),
    "1 image, 20 steps, sigmoids": (1, 20, True, False),
    "1 image, 1 step of Adam, sigmoids": (1, 1, True, True),
    "4 images of 4 classes, 1 step, sigmoids": (4, 1, True, False),
    "8 images of 8 classes, 1 step, sigmoids": (8, 1, True, False),
}


def network(smooth: bool) -> nn.Module:
    """Two convolutions and a linear head."""
    act = nn.Sigmoid if smooth else nn.ReLU
    first, second = nn.Conv2d(1, 12, 5, padding=2, stride=2), nn.Conv2d(12, 12, 5, padding=2)
    return nn.Sequential(first, act(), second, act(), nn.Flatten(), nn.Linear(192, 10))


def tune(net: nn.Module, images: Tensor, labels: Tensor, steps: int, adam: bool) -> nn.Module:
    """The network after some steps on the images."""
    after = copy.deepcopy(net)
    kind = torch.optim.Adam if adam else torch.optim.SGD
    optimizer = kind(after.parameters(), lr=1e-3 if adam else RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(after(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return after


def measure(seed: int, steps: int) -> dict[str, float]:
    """The mean correlation of each case."""
    digits, found = load_digits(), dict[str, float]()
    for name, (count, tuned_for, smooth, adam) in CASES.items():
        chosen = [int((digits.target == label).nonzero()[0][seed]) for label in range(count)]
        images = torch.tensor(digits.images[chosen], dtype=torch.float32)[:, None] / 16
        labels = torch.arange(count)
        net = build(lambda smooth=smooth: network(smooth), seed)  # type: ignore[misc]
        change = as_gradient(net, tune(net, images, labels, tuned_for, adam))
        leak = audit(net, change, SHAPE, count=count, labels=labels, options=Inversion(steps=steps), seed=seed)
        pairs = zip(leak.samples.images, images, strict=True)
        found[name] = 100 * sum(correlation(made, true) for made, true in pairs) / count
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="[default: 3]")
    parser.add_argument("--steps", type=int, default=300, help="of each search [default: 300]")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print_spreads([measure(seed, chosen.steps) for seed in range(chosen.seeds)], "change", "correlation, %")


if __name__ == "__main__":
    main()
