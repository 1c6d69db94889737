"""An initialisation as the mean of groups, each led through tasks of its own: MGML."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mergekit_lfm.meta.adapt import Parameters
from mergekit_lfm.meta.episodes import sides
from mergekit_lfm.meta.losses import MetaLoss
from mergekit_lfm.train.examples import Batch
from mergekit_lfm.train.losses import Terms

EPOCH, RISE = 50, 17  # steps of an epoch, and epochs until the momentum is whole
FIRST = 0.8  # the momentum of the first epochs


class Groups(MetaLoss):
    """Momentum group meta-learning: the next start is m * start + (1 - m) * the mean of the groups' ends.

    A group goes from the start through its tasks, one after the other, by plain steps down the loss that fomaml has.
    m is adaptive: after each epoch 1 - sigmoid(the change of the loss over the change before it, less 1), in the first
    epochs times their share of 17. Source: Zhu and Li 2022, Neurocomputing 514, and for m the authors' code.
    """

    def build(self) -> nn.Module:
        return Momentum()

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:  # noqa: ARG002
        start, count, rate = self.start(), int(self.number("group_count")), self.number("group_rate")

        def lead(tasks: Mapping[str, Batch]) -> tuple[Parameters, Tensor]:
            found: Parameters = start
            losses = list[Tensor]()
            for number in range(len(next(iter(tasks["support"].values())))):
                support, query = ({name: x[number] for name, x in tasks[side].items()} for side in ("support", "query"))
                slopes, loss = torch.func.grad_and_value(self.loss_of)(found, support, query)
                found = {name: x - rate * slopes[name] for name, x in found.items()}
                losses.append(loss)
            return found, torch.stack(losses).mean()

        parts = zip(("support", "query"), sides(batch), strict=True)
        grouped = {side: {name: x.reshape(count, -1, *x.shape[1:]) for name, x in part.items()} for side, part in parts}
        with torch.no_grad():
            ends, losses = torch.func.vmap(lead, randomness="different")(grouped)
            momentum = self.beside
            assert isinstance(momentum, Momentum)
            share = momentum.share(losses.mean())
            moved = {name: share * (x - ends[name]).sum(0) for name, x in start.items()}
        pull = torch.stack([(x * moved[name]).sum() for name, x in start.items()]).sum()
        return Terms(losses.sum() + pull - pull.detach(), count)


class Momentum(nn.Module):
    """The adaptive momentum, as a part of a model's state."""

    steps: Tensor
    value: Tensor
    total: Tensor
    means: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("value", torch.full((1,), FIRST))
        self.register_buffer("total", torch.zeros(1))  # of losses in this epoch
        self.register_buffer("means", torch.full((3,), torch.nan))  # of the last three epochs

    def share(self, loss: Tensor) -> float:
        """How far to go to the groups' mean in a step, 1 - m; takes note of its loss."""
        share = 1 - float(self.value)
        self.steps += 1
        self.total += loss.to(self.total)
        if int(self.steps) % EPOCH == 0:
            self.means.copy_(torch.cat([self.means[1:], self.total / EPOCH]))
            self.total.zero_()
            before, last = self.means.diff()
            if bool(last.isfinite()) and bool(before.isfinite()) and bool(before != 0):
                self.value.fill_(float((1 - last / before).sigmoid()) * min(1.0, int(self.steps) / EPOCH / RISE))
        return share
