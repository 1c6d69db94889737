"""Meta-learning without data on digits: initialisations from eight classifiers beside a random one and one with data.

    python benchmarks/meta_data_free.py                      # three seeds, some forty minutes on one core
    python benchmarks/meta_data_free.py --steps 5 --seeds 1  # a smoke test

Classes are those of `meta_digits.py`, but of seven digits, and each again as its negative (1 - pixel), as seven digits
have fewer than forty; seeds whose seven digits have fewer are left out. Forty of them, at random, are the tasks of
eight teachers, five each, disjoint; all teachers are trained from the same random start. The test is on classes of
three other digits: accuracy in percent on 15 other images of each of 5 classes after descent on 5 of each, over 100
episodes, each start in the cell of one grid of rates and steps that is best for it on 100 others. BiDf's teachers are
black boxes: the calls are counted, and no gradient may reach their numbers. PURER's start is also calibrated in each
episode: once it has adapted, images are made by its own gradients, and it learns on from them and the support set, by
their classes and the contrast of their vectors; for how long and at which rate, other episodes decide. Means over
seeds, with standard errors; and for each seed the 95 % interval over episodes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from meta_digits import ADAM, GRID, INNER, QUERIES, TASKS, WAYS, Net, new_net, rotated_digits
from seeds import spread
from torch import Tensor

from mergekit_lfm.distill.invert import Facts, Inversion, invert
from mergekit_lfm.meta.algorithms import build_loss
from mergekit_lfm.meta.black_box import BlackBox
from mergekit_lfm.meta.episodes import QUERY, SUPPORT, Episodes
from mergekit_lfm.meta.evaluate import Score, evaluate, summarise
from mergekit_lfm.meta.fusion import fuse
from mergekit_lfm.meta.losses import BESIDE, Inner
from mergekit_lfm.meta.pool import Pool, PoolEpisodes
from mergekit_lfm.meta.without_data import SMOOTH, BiDf, Purer
from mergekit_lfm.recipe.meta_algorithms import ALGORITHMS
from mergekit_lfm.recipe.training import Group, Options
from mergekit_lfm.runtime.load import logits
from mergekit_lfm.train.examples import Batch, Examples
from mergekit_lfm.train.loop import fit
from mergekit_lfm.train.losses import LOSSES, Loss
from mergekit_lfm.train.terms import build_loss as build_terms

TEACHERS, SHOTS, TESTED, COUNT = 8, 5, 100, 30
CELLS = [cell for cell in GRID if cell.rate != 0.01]
FIRST = 60  # steps of the images alone
CANDIDATES = range(100)  # seeds; those with enough classes are taken
RADIUS, CURRICULUM, DIRECTIONS, IMAGE_RATE = 0.5, 1.0, 20, 0.1
IMAGES, IMAGE_STEPS = 50, 60  # of each calibration
CALIBRATIONS = [Inner(steps, rate) for rate in (0.01, 0.03, 0.1) for steps in (5, 20)]
Start = Mapping[str, Tensor]


def with_negatives(examples: Examples) -> Examples:
    """The images, and as further classes 1 - each of them."""
    first = 1 + max(int(item["labels"]) for item in examples.items)
    return Examples(
        [*examples.items, *({"x": 1 - item["x"], "labels": item["labels"] + first} for item in examples.items)]
    )


def any_three(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Seven digits to learn, and three for the test."""
    order = random.permutation(10)
    return order[:7], order[7:]


def usable_seeds(count: int) -> list[int]:
    """The first seeds with forty classes to learn."""
    found = list[int]()
    for seed in CANDIDATES:
        labels = {int(item["labels"]) for item in rotated_digits(seed, any_three)[0].items}
        found += [seed] if 2 * len(labels) >= TEACHERS * WAYS else []
        if len(found) == count:
            break
    return found


def tasks_of(seen: Examples, seed: int) -> list[Examples]:
    """The examples of each of the eight tasks, with classes from 0."""
    labels = sorted({int(item["labels"]) for item in seen.items})
    chosen = np.random.default_rng(seed).permutation(labels)[: TEACHERS * WAYS]
    places = {int(label): divmod(number, WAYS) for number, label in enumerate(chosen)}
    items: list[list[dict[str, Tensor]]] = [[] for _ in range(TEACHERS)]
    for item in seen.items:
        if int(item["labels"]) in places:
            task, place = places[int(item["labels"])]
            items[task].append({"x": item["x"], "labels": torch.tensor(place)})
    return [Examples(each) for each in items]


def teach(examples: Examples, seed: int, number: int) -> Net:
    """A classifier of a task, from the start that all share; afterwards it is not trained."""
    net = new_net(seed)
    options = Options(steps=300, batch_size=64, learning_rate=3e-3, schedule="cosine", seed=seed + number)
    fit(net, examples, LOSSES["classification"], options)
    net.requires_grad_(False)
    return net


def numbers_of(net: Net) -> dict[str, Tensor]:
    """A copy of the parameters by their names, without what was learned beside them."""
    return {name: x.detach().clone() for name, x in net.named_parameters() if not name.startswith(f"{BESIDE}.")}


def average(teachers: Sequence[Net]) -> Start:
    """The mean of the teachers."""
    each = [numbers_of(net) for net in teachers]
    return {name: torch.stack([own[name] for own in each]).mean(0) for name in each[0]}


def fused(teachers: Sequence[Net], seed: int, steps: int) -> Start:
    """The prediction of DRO's network for the mean embedding."""
    flat = torch.stack([torch.cat([x.flatten() for x in numbers_of(net).values()]) for net in teachers])
    options = Options(steps=steps, batch_size=1, learning_rate=1e-2, schedule="cosine", clip=0.0, seed=seed)
    named = numbers_of(teachers[0])
    parts = torch.split(fuse(flat, RADIUS, options)[0], [x.numel() for x in named.values()])
    return {name: part.view(x.shape) for (name, x), part in zip(named.items(), parts, strict=True)}


def learn_from_images(teachers: Sequence[Net], name: str, seed: int, steps: int) -> Start:
    """PURER's or BiDf's initialisation, from the start that the teachers had."""
    net, pool = new_net(seed), Pool(TEACHERS, WAYS, COUNT, (1, 10, 10), seed=seed)
    calls = torch.zeros(2, dtype=torch.long)
    options = Options(
        steps=steps + FIRST,
        batch_size=TASKS,
        clip=0.0,
        seed=seed,
        groups=(Group("meta.*", learning_rate=IMAGE_RATE),),
        **ADAM,
    )
    episodes = PoolEpisodes(TEACHERS, WAYS, COUNT, SHOTS, QUERIES, alone=name == "bidf", seed=seed)
    loss: Purer | BiDf = (
        Purer(net, INNER, teachers, pool, "x", curriculum=CURRICULUM, first=FIRST)
        if name == "purer"
        else BiDf(
            net,
            INNER,
            [BlackBox(t, calls) for t in teachers],
            pool,
            "x",
            directions=DIRECTIONS,
            first=FIRST,
            seed=seed,
        )
    )
    for teacher in teachers:
        teacher.requires_grad_(name == "bidf")  # so that a gradient that reached them would be seen
    fit(net, episodes, loss, options)
    if name == "bidf":
        assert all(x.grad is None for teacher in teachers for x in teacher.parameters())
        print(f"# seed {seed}: BiDf asked {int(calls[0]):,} images, {int(calls[1]):,} requests", file=sys.stderr)
    return numbers_of(net)


def oracle(tasks: Sequence[Examples], seed: int, steps: int) -> Start:
    """MAML on the data of all tasks."""
    items = [
        {"x": item["x"], "labels": item["labels"] + WAYS * number}
        for number, task in enumerate(tasks)
        for item in task.items
    ]
    net = new_net(seed)
    loss = build_loss(net, "classification", ALGORITHMS["maml"], INNER)
    options = Options(steps=steps, batch_size=TASKS, seed=seed, **ADAM)
    fit(net, Episodes(Examples(items), WAYS, SHOTS, QUERIES, seed=seed), loss, options)
    return numbers_of(net)


def calibrate(start: Start, support: Batch, cell: Inner, how: Inner, seed: int) -> Net:
    """A start after adapting to a support set, and after so many steps on it and on images of what has adapted."""
    net = new_net(seed)
    net.load_state_dict({**start}, strict=False)
    _descend(net, support, LOSSES["classification"], cell)
    options = Inversion(steps=IMAGE_STEPS, learning_rate=IMAGE_RATE, batch_size=IMAGES)
    targets = torch.arange(WAYS).repeat_interleave(IMAGES // WAYS)
    terms = {"one_hot": 1.0, **SMOOTH}
    made = invert(net, terms, (1, 10, 10), IMAGES, options=options, facts=Facts(targets=targets), seed=seed).images
    both = {"x": torch.cat([support["x"], made]), "labels": torch.cat([support["labels"], targets])}
    _descend(net, both, build_terms("classification", {"supcon": 1.0}, {}), how)
    return net


def _descend(net: Net, batch: Batch, loss: Loss, how: Inner) -> None:
    assert how.rate is not None
    descent = torch.optim.SGD(net.parameters(), lr=how.rate)
    net.train()
    for _ in range(how.steps):
        descent.zero_grad()
        total, number = loss(net, batch)
        torch.autograd.backward(total / number)
        descent.step()
    net.eval()


def evaluate_calibrated(start: Start, episodes: Episodes, cell: Inner, seed: int) -> Score:
    """The accuracy of a start that adapts in a cell of the grid and is calibrated; how, other episodes decide."""

    def scores(numbers: range, how: Inner) -> Tensor:
        found = list[Tensor]()
        for number in numbers:
            drawn = {name: x[0] for name, x in episodes.batch([number]).items()}
            support, query = (
                {name.removeprefix(side): x for name, x in drawn.items() if name.startswith(side)}
                for side in (SUPPORT, QUERY)
            )
            net = calibrate(start, support, cell, how, seed + number)
            with torch.no_grad():
                found.append((logits(net(query["x"])).argmax(-1) == query["labels"]).float().mean())
        return torch.stack(found)

    tried = {how: float(scores(range(TESTED, 2 * TESTED), how).mean()) for how in CALIBRATIONS}
    return summarise(cell, scores(range(TESTED), max(tried, key=tried.__getitem__)))


def compare(seed: int, steps: int) -> dict[str, float]:
    """The accuracies of one seed, by the name of the start."""
    seen, unseen = rotated_digits(seed, any_three)
    tasks = tasks_of(with_negatives(seen), seed)
    teachers = [teach(task, seed, number) for number, task in enumerate(tasks)]
    test = Episodes(unseen, WAYS, SHOTS, QUERIES, seed=seed + 1000)
    plain = build_loss(new_net(seed), "classification", replace(ALGORITHMS["maml"], first_order=True), Inner(1, 0.1))
    makers: Mapping[str, Callable[[], Start]] = {
        "random": lambda: numbers_of(new_net(seed)),
        "`average`": lambda: average(teachers),
        "`dro`": lambda: fused(teachers, seed, steps),
        "`purer`": lambda: learn_from_images(teachers, "purer", seed, steps),
        "`bidf`": lambda: learn_from_images(teachers, "bidf", seed, steps),
        "`maml` with data": lambda: oracle(tasks, seed, steps),
    }
    found = dict[str, float]()
    for name, make in makers.items():
        began = time.monotonic()
        start = make()
        trained = time.monotonic() - began
        score = evaluate(plain, start, test, CELLS, TESTED)
        found[name] = 100 * score.mean
        cell = f"{score.steps} steps at {score.rate}; made in {trained:.0f} s"
        print(
            f"# seed {seed}: {name} {found[name]:.1f} ± {100 * score.interval:.1f}, {cell}", file=sys.stderr, flush=True
        )
        if name == "`purer`":
            calibrated = evaluate_calibrated(start, test, Inner(score.steps, score.rate), seed)
            found["`purer`, calibrated"] = 100 * calibrated.mean
    return found


def main() -> None:
    """Run the comparison, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [compare(seed, options.steps) for seed in usable_seeds(options.seeds)]
    print("| start | accuracy | more than the random start |\n|---|--:|--:|")
    for name in found[0]:
        shown = "{:.1f} ± {:.1f}".format(*spread([each[name] for each in found]))
        gain = "{:.1f} ± {:.1f}".format(*spread([each[name] - each["random"] for each in found]))
        print(f"| {name} | {shown} | {'' if name == 'random' else gain} |")


if __name__ == "__main__":
    main()
