"""Draw tokens at random from a model's scores: in float64 on the processor, each text by its own stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lfm.errors import PlanError
from mergekit_lfm.runtime.generate import most_likely

FIRST = 1024  # tokens that are sorted, unless the most likely ones of `top_p` are more


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn. temperature: the scores are divided by it; with 0 the most likely token is taken.

    top_k: only the k most likely tokens, and those as likely as the last of them; None for all. top_p: of these only
    the most likely ones whose probabilities sum to at least p. The order is that of transformers' generation.
    Source: Holtzman et al. 2020, arXiv 1904.09751, section 3.1 for top_p; Fan et al. 2018, arXiv 1805.04833, section
    5.1 for top_k.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def filter(self, scores: Tensor) -> Tensor:
        """The scores [n, vocabulary] by the temperature, minus infinity for tokens that are left out."""
        scores = scores / self.temperature
        if self.top_k is not None:
            least = scores.topk(min(self.top_k, scores.shape[-1])).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        return scores if self.top_p >= 1 else _most_likely(scores, self.top_p)

    def pick(self, scores: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """A token of each row of scores [n, vocabulary], by the next number of the row's generator, [n].

        Raises PlanError for scores that are not numbers.
        """
        if not bool(scores.amax(-1).isfinite().all()):
            raise PlanError(
                "the model's scores of a token are not finite; expected numbers. Check the model with `mergekit-lfm "
                "eval`, or compute in float32"
            )
        if self.temperature == 0:
            return most_likely(scores)
        sums = self.filter(scores.cpu().double()).softmax(-1).cumsum(-1)  # [n, vocabulary]
        draws = torch.stack([torch.rand(1, dtype=torch.float64, generator=each) for each in generators])  # [n, 1]
        return torch.searchsorted(sums, draws * sums[:, -1:], right=True)[:, 0]


def _most_likely(scores: Tensor, mass: float) -> Tensor:
    """The scores of the fewest tokens whose probabilities sum to at least `mass`, minus infinity for the others."""
    chances, size = scores.softmax(-1), min(FIRST, scores.shape[-1])
    values, order = chances.topk(size)
    sums = values.cumsum(-1)
    if not bool((sums[:, -1] >= mass).all()):
        values, order = chances.topk(scores.shape[-1])
        sums = values.cumsum(-1)
    above = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], -1)  # the mass of all that are more likely
    kept = torch.zeros_like(chances, dtype=torch.bool).scatter(-1, order, above < mass)
    return scores.masked_fill(~kept, -torch.inf)
