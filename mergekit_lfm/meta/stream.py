"""Tasks that come one after the other, and nothing says when one ends: Continual-MAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.meta.adapt import Parameters, adapt
from mergekit_lfm.meta.episodes import Episodes, sides
from mergekit_lfm.meta.losses import MetaLoss, key_of
from mergekit_lfm.train.examples import Batch, seed_of
from mergekit_lfm.train.losses import Terms


@dataclass(frozen=True, eq=False)
class Stream(Episodes):
    """Episodes that are chunks of a stream: each is of the task of the one before with probability `stay`."""

    stay: float = 0.9

    @property
    def digest(self) -> str:
        return f"{super().digest} {self.stay}"

    def task_of(self, number: int) -> int:
        """The number of the chunk with which the task of a chunk began."""
        while number and self._random(number) < self.stay:
            number -= 1
        return number

    def _random(self, number: int) -> float:
        generator = torch.Generator().manual_seed(seed_of(self.seed, "stream", number))
        return float(torch.rand(1, generator=generator, dtype=torch.float64))

    def _places(self, number: int, *, hard: bool) -> list[int]:
        return super()._places(self.task_of(number), hard=hard)


class Continual(MetaLoss):
    """Continual-MAML: fast weights that follow the stream, and slow ones, the model, from which they begin anew.

    Of each chunk the fast weights are judged first, and then adapt to it. A fall of the loss by `threshold` or more
    tells that the task is a new one: the fast weights begin anew from the slow ones. These descend with each chunk on
    the loss of the query set after adapting from them to the support set, which counts 1 - exp(-smoothing * loss): what
    is known well moves them little. The fast weights do not reach them: they are how the stream was met, whose loss the
    training reports. Source: Caccia et al. 2020, arXiv 2003.05856, algorithm 2. There a task's chunks are collected,
    and the slow weights move when it ends, so that no step is of two tasks; here a chunk has both sets.
    """

    def build(self) -> nn.Module:
        return Fast(self.start())

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:  # noqa: ARG002
        start, episodes, fast = self.start(), sides(batch), self.beside
        assert isinstance(fast, Fast)
        totals, count = list[Tensor](), len(next(iter(episodes.support.values())))
        for number in range(count):
            support, query = ({name: x[number] for name, x in side.items()} for side in episodes)
            slow = self.loss_of(start, support, query)
            weight = 1 - torch.exp(-self.number("smoothing") * slow.detach())
            met = self.follow(fast, {name: x.detach() for name, x in start.items()}, support)
            totals.append(weight * (slow - slow.detach()) + met)
        return Terms(torch.stack(totals).sum(), count)

    @torch.no_grad()
    def follow(self, fast: Fast, start: Parameters, support: Batch) -> Tensor:
        """Have the fast weights follow a chunk; their loss before that."""
        assert self.inner.rate is not None
        steps, rate = self.inner.steps, self.inner.rate
        now = fast.weights() if bool(fast.chunks) else start
        before = self.objective(now, support)
        found = adapt(self.objective, now, support, steps=steps, rate=rate, first_order=True)
        if before - self.objective(found, support) >= self.number("threshold") and bool(fast.chunks):
            found = adapt(self.objective, start, support, steps=steps, rate=rate, first_order=True)
            fast.changes += 1
        fast.chunks += 1
        fast.met += before
        fast.keep(found)
        return before

    def facts(self) -> dict[str, Any]:
        fast = self.beside
        assert isinstance(fast, Fast)
        return {"met": float(fast.met / fast.chunks), "changes": int(fast.changes)}


class Fast(nn.Module):
    """Fast weights, as a part of a model's state. chunks: that were met; met: the sum of their losses before adapting.

    changes: of the task, as far as they were seen.
    """

    chunks: Tensor
    met: Tensor
    changes: Tensor

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = [*start]
        for name, x in start.items():
            self.register_buffer(self._key(name), x.detach().clone())
        like = next(iter(start.values()))
        for name in ("chunks", "met", "changes"):
            self.register_buffer(name, like.new_zeros(1, dtype=torch.float64))

    def weights(self) -> dict[str, Tensor]:
        """The weights by the names of the model's parameters."""
        return {name: self.get_buffer(self._key(name)) for name in self._names}

    @staticmethod
    def _key(name: str) -> str:
        return f"of/{key_of(name)}"

    def keep(self, found: Parameters) -> None:
        """Take these weights."""
        for name, x in self.weights().items():
            x.copy_(found[name])
