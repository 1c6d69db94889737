"""Compare students of a teacher on scikit-learn's digits, each with 100 labels, over several seeds.

    python benchmarks/distill_digits.py                      # three seeds, about ten minutes on one core
    python benchmarks/distill_digits.py --steps 5 --seeds 1  # a smoke test

Teachers are vision transformers that `tune` trains on 1,297 labelled images; students are narrower ones with random
weights. The first table has the same 100 images for all; `all images` has the others, too, without their labels. The
second is of a student of the classes 5 to 9, whose teacher knows 0 to 4 alone. The third is of one student of two
teachers, who know five classes each. Numbers are accuracy on 500 other images in percent, means with standard errors.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from seeds import print_spreads
from sklearn.datasets import load_digits

from mergekit_lfm import accuracy, distill_model, tune_model
from mergekit_lfm.runtime.load import load_model

LABELLED, TESTED = 100, 500
LARGE = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
DEEP = {**SMALL, "num_hidden_layers": 6}
HOW: dict[str, Any] = {"task": "classification", "batch_size": 32, "threads": 1, "schedule": "cosine", "warmup": 0.1}


def save_images(file: Path, images: np.ndarray, labels: np.ndarray | None) -> Path:
    """Images [n, 8, 8] with their labels, or without, as `tune` and `distill` read them."""
    pixels = (images[:, None] / 8 - 1).astype(np.float32)
    if labels is None:
        np.savez(file, pixel_values=pixels)
    else:
        np.savez(file, pixel_values=pixels, labels=labels.astype(np.int64))
    return file


def save_new(folder: Path, sizes: Mapping[str, Any], classes: int, seed: int) -> Path:
    """A vision transformer with random weights for images of 8 x 8."""
    torch.manual_seed(seed)
    drawn: dict[str, Any] = {"initializer_range": 0.1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    fixed: dict[str, Any] = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": classes}
    config = transformers.ViTConfig(**fixed, **sizes, **drawn)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


class Digits:
    """The images of a seed, in a folder: of all classes, and of the first and the last five of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        data = load_digits()
        order = np.random.default_rng(seed).permutation(len(data.target))
        images, labels = data.images[order], data.target[order]
        rest = slice(TESTED, None)
        self.test = save_images(folder / "test.npz", images[:TESTED], labels[:TESTED])
        self.train = save_images(folder / "train.npz", images[rest], labels[rest])
        self.all = save_images(folder / "all.npz", images[rest], None)
        few = slice(TESTED, TESTED + LABELLED)
        self.few = save_images(folder / "few.npz", images[few], labels[few])
        self.halves = []
        for number, classes in enumerate((range(5), range(5, 10))):
            own = [np.isin(part, classes) for part in (labels[:TESTED], labels[rest])]
            first = classes[0]
            test = save_images(folder / f"test{number}.npz", images[:TESTED][own[0]], labels[:TESTED][own[0]] - first)
            some = images[rest][own[1]], labels[rest][own[1]] - first
            whole = save_images(folder / f"train{number}.npz", *some)
            self.halves.append((whole, save_images(folder / f"few{number}.npz", *(x[:LABELLED] for x in some)), test))


def score(model: Path, data: Path) -> float:
    """The accuracy in percent."""
    return 100 * accuracy(load_model(model, "classification"), data).accuracy


def compare(folder: Path, seed: int, steps: int) -> list[dict[str, float]]:
    """The accuracies of one seed, by the name of the student, for each table."""
    digits, how = Digits(folder, seed), {**HOW, "seed": seed, "steps": steps, "learning_rate": 2e-3}

    def taught(name: str, data: Path, classes: int = 10) -> Path:
        new = save_new(folder / f"new-{name}", LARGE, classes, seed)
        tune_model(new, data, folder / name, **how)
        return folder / name

    def student(name: str, sizes: Mapping[str, Any], teachers: Any, data: Path, loss: Any, **more: Any) -> Path:
        new = save_new(folder / f"start-{name}", sizes, more.pop("classes", 10), seed + 100)
        if teachers is None:
            tune_model(new, data, folder / name, **how)
        else:
            distill_model(new, teachers, data, folder / name, loss=loss, **{**how, **more})
        return folder / name

    teacher, (first, few_last, last_test) = (
        taught("teacher", digits.train),
        (digits.halves[0][0], *digits.halves[1][1:]),
    )
    both, layers = {"kd": 0.9, "task": 0.1}, {2: 1, 4: 3, 6: 4}
    one = {"teacher": score(teacher, digits.test)}
    for name, sizes, data, loss, more in (
        ("labels alone", SMALL, digits.few, None, {}),
        ("kd and labels", SMALL, digits.few, both, {"temperature": 4.0}),
        ("kd alone, all images", SMALL, digits.all, {"kd": 1.0}, {"temperature": 4.0}),
        ("deep: labels alone", DEEP, digits.few, None, {}),
        ("deep: kd and labels", DEEP, digits.few, both, {"temperature": 4.0}),
        ("deep: vid, kd, labels", DEEP, digits.few, {**both, "vid": 0.1}, {"temperature": 4.0, "layers": layers}),
    ):
        one[name] = score(student(name, sizes, None if loss is None else teacher, data, loss, **more), digits.test)
    halves = {**how, "steps": max(1, steps // 2)}
    hinted = student("hinted", DEEP, teacher, digits.few, {"hint": 1.0}, layers=layers, **halves)
    distill_model(hinted, teacher, digits.few, folder / "deep-kd", loss=both, temperature=4.0, **halves)
    one["deep: hint, then kd and labels"] = score(folder / "deep-kd", digits.test)
    half = taught("half", first, 5)
    other = {}
    for name, loss in (
        ("labels alone, 5 to 9", None),
        ("triplet and labels", {"task": 1.0, "triplet": 10.0}),
        ("triplet, local, labels", {"task": 1.0, "triplet": 10.0, "local": 0.1}),
        ("distance, angle, labels", {"task": 1.0, "distance": 2.0, "angle": 4.0}),
    ):
        of = None if loss is None else half
        other[name] = score(student(name, SMALL, of, few_last, loss, classes=5), last_test)
    parts = [
        {"model": str(half), "classes": (0, 4)},
        {"model": str(taught("other", digits.halves[1][0], 5)), "classes": (5, 9)},
    ]
    joined = {
        "two teachers, all images": score(
            student("joined", SMALL, parts, digits.all, {"kd": 1.0}, temperature=4.0), digits.test
        ),
        "two teachers and 100 labels": score(
            student("joined-few", SMALL, parts, digits.few, {"kd": 0.5, "task": 0.5}, temperature=4.0), digits.test
        ),
    }
    return [one, other, joined]


def main() -> None:
    """Run the comparison, and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    found = list[list[dict[str, float]]]()
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as place:
            found.append(compare(Path(place), seed, arguments.steps))
        print(json.dumps(found[-1]), flush=True)
    for tables in zip(*found, strict=True):
        print_spreads(tables, "student", "accuracy")


if __name__ == "__main__":
    main()
