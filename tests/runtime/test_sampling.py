"""Tokens drawn at random, against the filters of transformers and against the probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from mergekit_lfm import PlanError
from mergekit_lfm.runtime.sampling import Sampling
from mergekit_lfm.train.examples import seed_of

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("vocabulary", [7, 3000])  # sorted whole, and by the first of them
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 5, 1), (1, None, 0.4), (3, 2000, 0.99), (0.2, 4, 0.8)]
)
def test_the_filters_are_those_of_transformers(
    vocabulary: int, temperature: float, top_k: int | None, top_p: float
) -> None:
    scores = 3 * torch.randn(4, vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    steps: list[Any] = [transformers.TemperatureLogitsWarper(float(temperature))]
    steps += [] if top_k is None else [transformers.TopKLogitsWarper(top_k)]
    steps += [] if top_p == 1 else [transformers.TopPLogitsWarper(top_p)]
    expected = scores
    for step in steps:
        expected = step(None, expected)
    found = Sampling(temperature, top_k, top_p).filter(scores)
    assert torch.equal(found, expected)
    left = found.isfinite().sum(-1)
    assert (left >= 1).all() and (vocabulary == 7 or (left < vocabulary).all())


def test_a_flat_distribution_keeps_as_many_tokens_as_transformers_does() -> None:
    """More than are sorted first: 0.6 of 3,000."""
    scores = torch.zeros(1, 3000, dtype=torch.float64)
    found = Sampling(top_p=0.6).filter(scores)
    assert abs(int(found.isfinite().sum()) - 1800) <= 1  # rounding of 1 / 3000
    assert int(Sampling(top_k=10).filter(scores).isfinite().sum()) == 3000  # as likely as the last one


def test_frequencies_are_the_probabilities() -> None:
    logs = torch.tensor([[0.0, 1.0, -1.0, 2.0, -torch.inf, 0.5]])
    sampling = Sampling(temperature=1.5, top_k=4)
    rows = 20_000
    streams = [torch.Generator().manual_seed(seed_of(3, number, 0)) for number in range(rows)]
    drawn = torch.bincount(sampling.pick(logs.expand(rows, -1), streams), minlength=6).double()
    chances = torch.softmax(torch.where(logs[0] >= 0, logs[0] / 1.5, -torch.inf).double(), -1)
    assert drawn[chances == 0].sum() == 0
    kept = chances > 0
    assert chisquare(drawn[kept].numpy(), (rows * chances[kept]).numpy()).pvalue > 0.01


def test_a_stream_goes_on_by_one_number_a_token_whatever_row_it_is() -> None:
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    alone = [torch.Generator().manual_seed(7) for _ in range(2)]
    together = [torch.Generator().manual_seed(seed) for seed in (5, 7, 6)]
    for _ in range(3):
        whole = Sampling().pick(scores, together)
        assert int(Sampling().pick(scores[1:2], alone[:1])) == int(whole[1])
    assert torch.equal(Sampling(temperature=0).pick(scores, together), scores.argmax(-1))


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(PlanError, match="scores of a token are not finite"):
        Sampling().pick(torch.tensor([[0.0, torch.nan]]), [torch.Generator()])
