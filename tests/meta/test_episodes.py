"""Episodes: what they are made of, that they depend on the seed alone, and how starts are judged on them."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from test_adapt import EPISODES, Named, small

from mergekit_lfm.errors import PlanError
from mergekit_lfm.meta.algorithms import build_loss
from mergekit_lfm.meta.episodes import Episodes, sides
from mergekit_lfm.meta.evaluate import evaluate, score_cells, summarise
from mergekit_lfm.meta.losses import Inner
from mergekit_lfm.recipe.meta_algorithms import ALGORITHMS
from mergekit_lfm.train.examples import Examples, join


def numbered(classes: int, each: int = 6, first: int = 0) -> Examples:
    """Examples that tell their number and their class."""
    labels = torch.arange(classes).repeat_interleave(each)
    return Examples([{"x": torch.tensor([first + i]), "labels": label} for i, label in enumerate(labels)])


def test_an_episode_has_other_examples_to_judge_by_and_classes_of_its_own() -> None:
    episodes = Episodes(numbered(7), 3, 2, 4, seed=5)
    support, query = sides(episodes.batch([0, 1, 2]))
    assert support["x"].shape == (3, 6, 1) and query["x"].shape == (3, 12, 1)
    for number in range(3):
        mine, others = (side["x"][number, :, 0] for side in (support, query))
        assert not {*mine.tolist()} & {*others.tolist()} and len({*others.tolist()}) == 12
        classes = {way: {*(mine[support["labels"][number] == way] // 6).tolist()} for way in range(3)}
        assert [len(found) for found in classes.values()] == [1, 1, 1] and len(set.union(*classes.values())) == 3
        for way in range(3):
            assert {*(others[query["labels"][number] == way] // 6).tolist()} == classes[way]


def test_episodes_are_a_function_of_seed_and_number() -> None:
    episodes, again = (Episodes(numbered(7), 3, 2, 4, seed=5) for _ in range(2))
    whole = episodes.batch([4, 9])
    assert torch.equal(whole["support/x"][1], again.batch([9])["support/x"][0])
    other = Episodes(numbered(7), 3, 2, 4, seed=6).batch([4, 9])
    assert not torch.equal(whole["support/x"], other["support/x"])
    assert episodes.step(3, 4, 0) == [12, 13, 14, 15] and len([*episodes.in_order(30)]) == 4


def test_data_sets_are_tasks_with_labels_as_they_are() -> None:
    sets = join([numbered(2, 4), numbered(2, 4, first=100)], [None, None])
    support, query = sides(Episodes(sets, None, 2, 3).batch(range(8)))
    places = torch.cat([support["x"], query["x"]], 1)[..., 0]
    assert all(len({*(row // 100).tolist()}) == 1 for row in places) and len({*(places // 100).flatten().tolist()}) == 2
    assert torch.equal(support["labels"], support["x"][..., 0] % 100 // 4)


def test_hard_classes_come_in_the_second_half_of_a_step() -> None:
    hardness = torch.arange(20.0)
    batch = Episodes(numbered(20), 3, 2, 4, hardness=hardness).batch(range(40))
    assert batch["classes"][:20].min() < 5 and batch["classes"][20:].min() >= 10


@pytest.mark.parametrize(
    ("ways", "shots", "message"),
    [(8, 2, "found 7 classes in the data; expected 8 or more"), (3, 5, "2 and 4|5 and 4 .* class 0 has 6")],
)
def test_too_few_examples_are_refused(ways: int, shots: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Episodes(numbered(7), ways, shots, 4)


def test_a_start_is_judged_in_its_best_cell_on_other_episodes() -> None:
    loss = build_loss(Named(small()), "classification", ALGORITHMS["maml"], Inner(1, 0.1))
    start = {name: x.detach() for name, x in loss.start().items()}
    cells = [Inner(1, 1e-4), Inner(5, 0.5), Inner(5, 1e6)]
    score = evaluate(loss, start, EPISODES, cells, 40)
    assert (score.steps, score.rate) == (5, 0.5)
    (alone,) = score_cells(loss, start, EPISODES, range(40), [Inner(5, 0.5)]).values()
    assert score.mean == pytest.approx(alone.mean().item())
    tried = score_cells(loss, start, EPISODES, range(7), [Inner(2, 0.3), Inner(5, 0.3)])  # one run for both
    assert torch.equal(
        tried[Inner(5, 0.3)], score_cells(loss, start, EPISODES, range(7), [Inner(5, 0.3)])[Inner(5, 0.3)]
    )


def test_an_interval_is_that_of_the_normal_distribution() -> None:
    values = [0.2, 0.5, 0.9, 0.4]
    score = summarise(Inner(1, 0.1), torch.tensor(values))
    assert score.mean == pytest.approx(0.5) and score.interval == pytest.approx(
        1.96 * statistics.stdev(values) / math.sqrt(4)
    )
