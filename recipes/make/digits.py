#!/usr/bin/env python3
"""Make the inputs of recipes/digits_*.yaml: classifiers of digits, and statistics of them.

    pip install -c constraints.txt -e ".[test]"
    python recipes/make/digits.py recipes/digits               # seconds; 7 MB
    merge recipes/digits_regmean.yaml
    python recipes/make/digits.py --judge recipes/digits/base recipes/digits/rot90 merged/digits_regmean

The images are scikit-learn's, 8 x 8; nothing is fetched. The base learns five views from a few images, and each
fine-tune one view from all of them; the views conflict: a 6 turned by 180 degrees is a 9. `one` and `two` learn the
images as they are, each from a start of its own: nothing pairs their units.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mergekit_lfm.collect.run import collect
from mergekit_lfm.judge.evaluate import accuracy

Examples = tuple[Tensor, Tensor]  # inputs [n, 64] in [0, 1], labels [n]

VIEWS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "rot90": lambda images: images.rot90(1, (1, 2)),
    "rot180": lambda images: images.rot90(2, (1, 2)),
    "mirrored": lambda images: images.flip(2),
    "upside_down": lambda images: images.flip(1),
    "inverted": lambda images: 1 - images,
}
WIDTH = 256
TRAINED_ON = 1347  # of the 1,797 images; the others are for judging
BASE_IMAGES = 80  # enough for features that all views share, too few to be good at any
BASE_EPOCHS, BASE_RATE = 100, 3e-3
TUNE_EPOCHS, TUNE_RATE = 10, 1e-3
ALONE_EPOCHS, ALONE_RATE = 60, 1e-3
BATCH = 64


@dataclass(frozen=True)
class Task:
    """Digits in one view: what a fine-tune learns from, and what it is judged on."""

    train: Examples
    test: Examples


class Classifier(nn.Module):
    """A perceptron with two hidden layers and ReLU; inputs [n, 64], logits [n, 10]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.last(self.second(self.first(inputs).relu()).relu())
        return logits


def make_tasks(seed: int, views: Mapping[str, Callable[[Tensor], Tensor]] = VIEWS) -> dict[str, Task]:
    """The views of the same images. seed: which images are for training and in which order."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)  # [n, 8, 8]; pixels are 0 to 16
    labels = torch.tensor(digits.target)
    train, test = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tensor_split([TRAINED_ON])

    def seen(view: Callable[[Tensor], Tensor], rows: Tensor) -> Examples:
        return view(images[rows]).flatten(1), labels[rows]

    return {name: Task(seen(view, train), seen(view, test)) for name, view in views.items()}


def make_upright(seed: int) -> Task:
    """The images as they are."""
    return make_tasks(seed, {"upright": lambda images: images})["upright"]


def together(parts: Iterable[Examples], most: int | None = None) -> Examples:
    """The first `most` examples of every part, or all of them."""
    inputs, labels = zip(*((x[:most], y[:most]) for x, y in parts), strict=True)
    return torch.cat(inputs), torch.cat(labels)


def train(model: nn.Module, examples: Examples, *, epochs: int, rate: float, seed: int) -> None:
    """Adam on the cross entropy; seed: the order of the examples."""
    inputs, labels = examples
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(inputs), generator=draw), BATCH):
            loss = cross_entropy(model(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def make_base(tasks: Mapping[str, Task], width: int, seed: int) -> Classifier:
    """The common start: it has seen a few images, in every view."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Classifier(width)
    few = together((task.train for task in tasks.values()), BASE_IMAGES)
    train(model, few, epochs=BASE_EPOCHS, rate=BASE_RATE, seed=seed)
    return model


def tuned(base: Classifier, examples: Examples, seed: int) -> Classifier:
    """A copy of the base, trained further on the examples."""
    model = Classifier(base.first.out_features)
    model.load_state_dict(base.state_dict())
    train(model, examples, epochs=TUNE_EPOCHS, rate=TUNE_RATE, seed=seed)
    return model


def trained_alone(examples: Examples, width: int, seed: int) -> Classifier:
    """A classifier with a start and an order of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Classifier(width)
    train(model, examples, epochs=ALONE_EPOCHS, rate=ALONE_RATE, seed=seed)
    return model.eval()


def save(model: Classifier, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})


def load(folder: Path) -> Classifier:
    """The classifier in a folder; its tensors say how wide it is."""
    tensors = load_file(folder / "model.safetensors")
    model = Classifier(len(tensors["first.weight"]))
    model.load_state_dict(tensors)
    return model.eval()


def make_digits(out: Path, *, width: int = WIDTH, seed: int = 0) -> None:
    """base/ and a fine-tune for every view in out, and beside each fine-tune its Gram matrices and Fisher information.

    Also one/ and two/, and the cross moments of their activations.
    """
    tasks = make_tasks(seed)
    base = make_base(tasks, width, seed)
    save(base, out / "base")
    for name, task in tasks.items():
        model = tuned(base, task.train, seed)
        save(model, out / name)
        for kind in ("gram", "fisher"):
            file = out / f"{name}.{kind}.safetensors"
            collect(kind, model.eval(), [task.train], file, checkpoint=out / name, overwrite=True)
    upright = make_upright(seed)
    pair = {name: trained_alone(upright.train, width, 1000 + 2 * seed + i) for i, name in enumerate(("one", "two"))}
    for name, model in pair.items():
        save(model, out / name)
    collect(
        "cross",
        pair["one"],
        [upright.train],
        out / "one_two.cross.safetensors",
        other=pair["two"],
        checkpoint=out / "one",
        other_checkpoint=out / "two",
        overwrite=True,
    )


def judge(model: Classifier, tasks: Mapping[str, Task]) -> dict[str, float]:
    """The percentage of each task's test images that the model gets right."""
    return {name: 100 * accuracy(model, [task.test]).accuracy for name, task in tasks.items()}


def print_table(folders: Iterable[Path], seed: int, upright: bool) -> None:
    """Print how many test images of every view each model gets right, in percent; or of the images as they are."""
    tasks = {"upright": make_upright(seed)} if upright else make_tasks(seed)
    print(f"| model | {' | '.join(tasks)} | mean |")
    print("|---|" + "--:|" * (len(tasks) + 1))
    for folder in folders:
        found = judge(load(folder), tasks).values()
        cells = [f"{value:.1f}" for value in (*found, sum(found) / len(found))]
        print(f"| {folder} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="where to write; with --judge the models to judge")
    parser.add_argument("--judge", action="store_true", help="print the accuracies of models instead of making them")
    parser.add_argument("--upright", action="store_true", help="judge on the images as they are")
    parser.add_argument("--width", type=int, default=WIDTH, help=f"of the hidden layers [default: {WIDTH}]")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the base and the order [default: 0]")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.judge:
        if absent := [str(folder) for folder in options.folders if not (folder / "model.safetensors").is_file()]:
            parser.error(f"found no model.safetensors in {', '.join(absent)}; make or merge the model first")
        print_table(options.folders, options.seed, options.upright)
        return
    if len(options.folders) > 1:
        parser.error(f"found {len(options.folders)} folders to write to, expected one; or did you mean --judge?")
    (out,) = options.folders
    make_digits(out, width=options.width, seed=options.seed)
    (out / ".gitignore").write_text("*\n", "utf-8")


if __name__ == "__main__":
    main()
