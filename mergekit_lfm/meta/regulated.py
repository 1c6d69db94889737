"""Inner steps whose slopes pass a learned gate: GRAM."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mergekit_lfm.meta.adapt import Parameters, adapt
from mergekit_lfm.meta.episodes import sides
from mergekit_lfm.meta.losses import Inner, MetaLoss, key_of
from mergekit_lfm.train.examples import Batch
from mergekit_lfm.train.losses import Terms


class Regulated(MetaLoss):
    """GRAM: slopes are gated, so that steps on one domain also help another one.

    The gate of a slope is the sigmoid of a linear function, number by number, of the slope over the root of its mean
    square; it is learned with the start, from the query sets of a task and of the one after it in the batch. Its first
    values are 1/2, and the slopes that pass are doubled, so that the first steps are plain descent. Source: Li et al.
    2023, arXiv 2303.06571; the form of the function is ours.
    """

    def build(self) -> nn.Module:
        def gate(x: Tensor) -> nn.Parameter:  # of rows: the factors and the shifts
            return nn.Parameter(x.new_zeros(2, x.shape[-1] if x.ndim else 1))

        return nn.ParameterDict({key_of(name): gate(x) for name, x in self.start().items()})

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:  # noqa: ARG002
        start, episodes = self.start(), sides(batch)
        next_query = {name: x.roll(-1, 0) for name, x in episodes.query.items()}

        def one(support: Batch, query: Batch, other: Batch) -> Tensor:
            found = self.adapted(start, support, self.inner)
            return (self.objective(found, query) + self.objective(found, other)) / 2

        losses = torch.func.vmap(one, randomness="different")(episodes.support, episodes.query, next_query)
        return Terms(losses.sum(), len(losses))

    def adapted(self, start: Parameters, support: Batch, inner: Inner) -> Parameters:
        assert inner.rate is not None
        return adapt(self.objective, start, support, steps=inner.steps, rate=inner.rate, change=self.gated)

    def gated(self, name: str, slope: Tensor) -> Tensor:
        """A slope behind its gate."""
        assert isinstance(self.beside, nn.ParameterDict)
        factors, shifts = self.beside[key_of(name)]
        size = slope.square().mean().clamp_min(torch.finfo(slope.dtype).tiny).sqrt()  # 0 has a slope, too
        passed: Tensor = 2 * (factors * slope / size + shifts).sigmoid() * slope
        return passed
