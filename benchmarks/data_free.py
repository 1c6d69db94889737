"""Students without data: every preset for one teacher of digits, beside two baselines that prove nothing.

    python benchmarks/data_free.py                                     # three seeds: about an hour on one core
    python benchmarks/data_free.py --presets dfq deepinversion --seeds 0

A number is the student's accuracy in percent on 450 images that no model has seen, the mean over seeds ± the standard
deviation. Teachers are convolutional networks of 14 thousand parameters, with BatchNorm and without it; students have
3 thousand. Two baselines prove nothing: a student that learns the teacher's scores of uniform noise, and of such noise
when the teacher's BatchNorm takes the noise's own statistics. Records of teachers and clusters are of their
training images; wild and proxy images are patches of two photographs. A teacher without BatchNorm has the presets alone
whose terms read statistics.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from mergekit_lfm.distill.generation import Generation
from mergekit_lfm.distill.generators import build
from mergekit_lfm.distill.learner import Learner, Learning, learn
from mergekit_lfm.distill.metadata import collect_records, find_clusters
from mergekit_lfm.distill.passes import scores_in_parts
from mergekit_lfm.distill.samples import Samples, save_samples
from mergekit_lfm.distill.synthesise import Given, synthesise
from mergekit_lfm.recipe.synthesise_presets import PRESETS, Preset
from mergekit_lfm.runtime.batchnorm import batchnorms

N = TypeVar("N", bound=nn.Module)
SHAPE, TEST = (1, 8, 8), 450
STEPS = 1200  # of students


class Net(nn.Module):
    """A classifier of images [n, 1, 8, 8]: two convolutions with pooling, and a head with a hidden layer."""

    def __init__(self, channels: tuple[int, int], hidden: int, norm: bool) -> None:
        super().__init__()
        first, second = channels

        def normed(width: int) -> nn.Module:
            return nn.BatchNorm2d(width) if norm else nn.Identity()

        self.layers = nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1),
            normed(first),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 3, padding=1),
            normed(second),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * second, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The scores [n, 10]."""
        out: Tensor = self.layers(x)
        return out


@dataclass(frozen=True)
class Data:
    """Images [n, 1, 8, 8] in [0, 1] with labels: to train teachers, and to judge; and patches of photographs."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    wild: Tensor


def load() -> Data:
    """The digits in a fixed order, the last ones for judging, and 4,096 patches of 8 x 8 pixels."""
    from sklearn.datasets import load_digits, load_sample_images

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    patches = []
    for photo in load_sample_images().images:
        gray = torch.tensor(photo, dtype=torch.float32).mean(-1) / 255
        patches.append(gray.unfold(0, 8, 8).unfold(1, 8, 8).reshape(-1, 1, 8, 8))
    wild = torch.cat(patches)
    wild = wild[torch.randperm(len(wild), generator=torch.Generator().manual_seed(1))[:4096]]
    return Data((images[:-TEST], labels[:-TEST]), (images[-TEST:], labels[-TEST:]), wild)


def teach(data: Data, norm: bool, seed: int, epochs: int = 30) -> Net:
    """A teacher that is trained on the data."""
    return fit(build(lambda: Net((16, 32), 64, norm), seed), data.train, seed, epochs)


def fit(net: N, labelled: tuple[Tensor, Tensor], seed: int, epochs: int) -> N:
    """The network, trained on images with labels."""
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    images, labels = labelled
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(len(images), generator=generator), 64):
            loss = nn.functional.cross_entropy(net(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    return net.eval()


def new_student(seed: int) -> Net:
    """A student that has learned nothing."""
    return build(lambda: Net((8, 12), 32, True), 1000 + seed)


def judge(net: nn.Module, data: Data) -> float:
    """The accuracy on the images for judging, in percent."""
    images, labels = data.test
    return float((scores_in_parts(net, images, len(images)).argmax(-1) == labels).float().mean() * 100)


def on_noise(teacher: Net, student: Net, seed: int, steps: int, own_statistics: bool) -> None:
    """Train a student on the teacher's scores of uniform noise, new in each step."""
    learner = Learner(student, 10, Learning(), steps, seed)
    source = copy.deepcopy(teacher)
    for each in batchnorms(source).values() if own_statistics else []:
        each.momentum = 0.0
        each.train()
    for step in range(steps):
        noise = torch.rand(128, *SHAPE, generator=torch.Generator().manual_seed(1_000_000 * seed + step))
        with torch.no_grad():
            scores = source(noise)
        learner.step((noise, scores))


def follow(teacher: Net, student: Net, row: Preset, given: Given, seed: int, steps: int) -> Samples:
    """The images of a preset, on which the student was trained."""
    if row.family == "generator":
        rounds = row.generation.get("rounds", Generation().rounds)
        longer = {"rounds": max(1, rounds * steps // STEPS)}
        return synthesise(teacher, student, row, SHAPE, given=given, seed=seed, generation=longer).samples
    count = 2048 if row.family == "wild" else 256
    return synthesise(teacher, student, row, SHAPE, given=given, count=count, student_steps=steps, seed=seed).samples


def measure(
    data: Data, norm: bool, seed: int, presets: Sequence[str], steps: int, folder: Path | None
) -> dict[str, float]:
    """The accuracies of one seed, by name."""
    teacher = teach(data, norm, seed)
    found = {"teacher": judge(teacher, data)}
    train = data.train[0]

    def run(name: str, make: Callable[[Net], object]) -> None:
        student, began = new_student(seed), time.monotonic()
        made = make(student)
        found[name] = judge(student, data)
        print(f"# {name} {norm} {seed} {found[name]:.1f} {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        if folder is not None and isinstance(made, Samples):
            save_samples(folder / f"{name}-{'bn' if norm else 'plain'}-{seed}.npz", made)

    scores = scores_in_parts(teacher, train, len(train))
    run(
        "KD on the data",
        lambda student: learn(Learner(student, 10, Learning(), steps, seed), (train, scores), steps),
    )
    run("KD on noise", lambda student: on_noise(teacher, student, seed, steps, False))
    if norm:
        run("KD on noise, through BatchNorm", lambda student: on_noise(teacher, student, seed, steps, True))
    given = Given(None if norm else collect_records(teacher, train), find_clusters(teacher, train), data.wild)
    recorded = Given(collect_records(teacher, train), given.clusters, data.wild)
    for name in presets:
        row = PRESETS[name]
        if norm or {"bn", "records"} & row.terms.keys():
            facts = recorded if "records" in row.terms else given
            run(name, lambda student, row=row, facts=facts: follow(teacher, student, row, facts, seed, steps))  # type: ignore[misc]
    return found


def table(columns: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Means ± standard deviations over the seeds, a column for each teacher."""
    names = dict.fromkeys(name for scores in columns.values() for name in scores[0])
    lines = ["| student | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    for name in names:
        cells = []
        for scores in columns.values():
            own = torch.tensor([each[name] for each in scores if name in each])
            cells.append(f"{own.mean():.1f} ± {own.std(correction=min(1, len(own) - 1)):.1f}" if len(own) else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    alone = [name for name in PRESETS if name != "amalgamation"]  # which `amalgamation.py` measures
    parser.add_argument("--presets", nargs="+", default=alone, choices=[*PRESETS], help="[default: all but one]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[default: 0 1 2]")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each student [default: {STEPS}]")
    parser.add_argument("--teachers", nargs="+", default=["bn", "plain"], choices=["bn", "plain"])
    parser.add_argument("--samples", type=Path, help="a folder for the images")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = load()
    headings = {"bn": "with BatchNorm", "plain": "without it"}
    columns = {
        headings[kind]: [
            measure(data, kind == "bn", seed, chosen.presets, chosen.steps, chosen.samples) for seed in chosen.seeds
        ]
        for kind in chosen.teachers
    }
    print(table(columns))


if __name__ == "__main__":
    main()
