"""Classes with names: their vectors in episodes, the comparison against a formula, and names of classes never seen."""

from __future__ import annotations

import pytest
import torch
from test_adapt import Named, small
from test_episodes import numbered
from torch import nn

from mergekit_lfm.errors import PlanError
from mergekit_lfm.meta.algorithms import build_loss, make_episodes
from mergekit_lfm.meta.episodes import sides
from mergekit_lfm.meta.evaluate import evaluate
from mergekit_lfm.meta.film import Metric
from mergekit_lfm.meta.losses import Inner
from mergekit_lfm.recipe.meta_algorithms import ALGORITHMS
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.train.examples import Examples
from mergekit_lfm.train.loop import fit

ROW = ALGORITHMS["film"]


def test_episodes_have_the_vectors_of_the_names_of_their_classes() -> None:
    names = {label: torch.tensor([float(label), -1.0]) for label in range(7)}
    episodes = make_episodes(ROW, {}, numbered(7), names, ways=3, shots=2, queries=4, seed=5)
    support, query = sides(episodes.batch([0, 1]))
    assert torch.equal(support["texts"], query["texts"]) and support["texts"].shape == (2, 3, 2)
    for row in range(2):
        classes = support["x"][row, :, 0] // 6  # of the examples, by their numbers
        assert torch.equal(support["texts"][row, :, 0][support["labels"][row]], classes.float())
    del names[4], names[6]
    with pytest.raises(PlanError, match="found no name of the classes 4, 6; expected one of each"):
        make_episodes(ROW, {}, numbered(7), names, ways=3, shots=2, queries=4, seed=5)


def test_a_comparison_is_the_cosine_and_a_network_on_top() -> None:
    torch.manual_seed(0)
    metric, vectors, texts = Metric(6, 3).double(), torch.randn(5, 6).double(), torch.randn(4, 3).double()
    found = metric(vectors, texts)
    for row, vector in enumerate(vectors):
        for column, text in enumerate(texts):
            a, b = metric.visual(vector), metric.textual(text)
            added = metric.compare(a / a.norm() * (b / b.norm()))
            wanted = 20 * (nn.functional.cosine_similarity(a, b, 0) + added)
            torch.testing.assert_close(found[row, column], wanted.squeeze(), rtol=1e-9, atol=1e-12)


def test_classes_that_were_never_seen_are_known_by_their_names() -> None:
    """Names tell where a class lies: without a step of adapting new ones are found, and the metric alone adapts."""
    torch.manual_seed(1)
    names = {label: torch.randn(3).double() for label in range(40)}
    spread = torch.randn(3, 4).double()

    def some(labels: list[int]) -> Examples:
        items = [
            {"x": names[k] @ spread + 0.3 * torch.randn(4).double(), "labels": torch.tensor(k)} for k in labels * 8
        ]
        return Examples(items)

    model = Named(small())
    sizes = {"ways": 3, "shots": 2, "queries": 5, "seed": 0}
    loss = build_loss(model, "classification", ROW, Inner(2, 0.05), settings={"text_width": 3})
    fit(model, make_episodes(ROW, {}, some([*range(30)]), names, **sizes), loss, Options(60, 4, 0.02))
    unseen = make_episodes(ROW, {}, some([*range(30, 40)]), names, **sizes)
    assert evaluate(loss, loss.start(), unseen, [Inner(0, 0.1)], 50).mean > 0.7
    ((support, _),) = [sides({name: x[0] for name, x in unseen.batch([0]).items()})]
    start = loss.start()
    moved = {name for name, x in loss.adapted(start, support, Inner(1, 0.1)).items() if x is not start[name]}
    assert moved and all(name.startswith("meta.") for name in moved)
