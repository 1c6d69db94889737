"""Fine-tunes of a meta-learned start, merged: digits in views that conflict, small perceptrons.

    python benchmarks/meta_merge_digits.py                      # five seeds, some minutes on one core
    python benchmarks/meta_merge_digits.py --steps 2 --seeds 1  # a smoke test

Views and models are those of recipes/make/digits.py. The base has seen a few images in three of the five views. From it
a start is learned on the same three, of all their images, jointly, by MAML, of first order, or by Reptile, by as many
steps; then a copy of the start is tuned on each of the two other views, and both are averaged, or added to the base by
task arithmetic at the best of three scales. Numbers are the accuracy in percent: of the start and the averages over the
test sets of the two views, and of the fine-tunes on their own. `gap` is the fine-tunes' less the average's. Means over
seeds, which also choose the two views, with standard errors.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from seeds import spread

from mergekit_lfm import merge
from mergekit_lfm.meta.algorithms import build_loss
from mergekit_lfm.meta.baselines import joint_start
from mergekit_lfm.meta.episodes import Episodes
from mergekit_lfm.meta.losses import Inner
from mergekit_lfm.recipe.meta_algorithms import ALGORITHMS
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.train.examples import Examples, join
from mergekit_lfm.train.loop import fit

sys.path.append(str(Path(__file__).parents[1] / "recipes" / "make"))
from digits import VIEWS, Classifier, Task, judge, load, make_base, make_tasks, save, tuned

WIDTH, SHOTS, QUERIES, TASKS = 64, 50, 50, 3
ADAM: Mapping[str, Any] = {"learning_rate": 1e-3, "schedule": "cosine"}
SGD: Mapping[str, Any] = {"learning_rate": 0.5, "optimizer": "sgd", "schedule": "linear", "clip": 0.0}
HOW: Mapping[str, tuple[Inner, Mapping[str, Any]]] = {
    "maml": (Inner(5, 0.1), ADAM),
    "fomaml": (Inner(5, 0.1), ADAM),
    "reptile": (Inner(10, 0.1), SGD),
}
SCALES = (0.5, 0.7, 1.0)
COLUMNS = ("itself", "fine-tunes", "average", "gap", "task arithmetic")


def examples_of(task: Task) -> Examples:
    """The images of a task to learn from."""
    inputs, labels = task.train
    return Examples([{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)])


def start_of(name: str, base: Classifier, seen: list[Task], steps: int, seed: int) -> Classifier:
    """A start, by its name."""
    model = Classifier(WIDTH)
    model.load_state_dict(base.state_dict())
    if name == "plain":
        return model
    data = join([examples_of(task) for task in seen], [None] * len(seen))
    inner, settings = HOW.get(name, (Inner(1, 0.1), ADAM))
    loss = build_loss(model, "classification", ALGORITHMS[name if name in HOW else "fomaml"], inner)
    if name == "joint":
        whole = Options(steps=steps, batch_size=TASKS * (SHOTS + QUERIES), seed=seed, **settings)
        learned = joint_start(model, loss.start(), data, "classification", whole, by_classes=False)
    else:
        episodes = Episodes(data, None, SHOTS, QUERIES, seed=seed)
        fit(model, episodes, loss, Options(steps=steps, batch_size=TASKS, seed=seed, **settings))
        learned = loss.start()
    model.load_state_dict({key: x.detach() for key, x in learned.items()})
    return model


def compare(name: str, folder: Path, steps: int, seed: int) -> list[float]:
    """The numbers of a start."""
    tasks, pairs = make_tasks(seed), [*combinations(VIEWS, 2)]
    unseen = pairs[3 * seed % len(pairs)]
    old, new = ({key: task for key, task in tasks.items() if (key in unseen) == own} for own in (False, True))
    start = start_of(name, make_base(old, WIDTH, seed), [*old.values()], steps, seed)
    save(start, folder / "start")
    for view, task in new.items():
        save(tuned(start, task.train, seed), folder / view)
    own = sum(judge(load(folder / view), {view: task})[view] for view, task in new.items()) / 2
    models = [{"model": str(folder / view)} for view in unseen]

    def merged(out: str, **recipe: Any) -> float:
        merge({"models": models, **recipe}, folder / out, threads=1, card=False)
        return sum(judge(load(folder / out), new).values()) / 2

    average = merged("average", merge_method="linear", parameters={"weight": 0.5})
    added: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": str(folder / "start")}
    best = max(merged(f"added {x}", **added, parameters={"weight": 1.0, "lambda": x}) for x in SCALES)
    return [sum(judge(start.eval(), new).values()) / 2, own, average, own - average, best]


def main() -> None:
    """Run the comparison, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| start | {' | '.join(COLUMNS)} |\n|---|" + "--:|" * len(COLUMNS))
    for name in ("plain", "joint", *HOW):
        rows = []
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as place:
                rows.append(compare(name, Path(place), options.steps, seed))
        cells = ["{:.1f} ± {:.1f}".format(*spread(column)) for column in zip(*rows, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
