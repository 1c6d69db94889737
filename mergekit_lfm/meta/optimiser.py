"""Inner steps by a learned network: Meta-LSTM."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.meta.adapt import Parameters
from mergekit_lfm.meta.losses import Inner, MetaLoss
from mergekit_lfm.train.examples import Batch

SHRINK = 10.0  # p of the inputs: slopes below exp(-p) count by their size, larger ones by the logarithm of it
KEPT = 6.0  # the first score of the gate that keeps a number: 0.9975 of it


class LearnedSteps(MetaLoss):
    """Meta-LSTM: each number is the cell of an LSTM, theta <- f * theta - i * slope, whose gates a network makes.

    A first LSTM of `hidden` numbers, one for all numbers of the model, reads the slope and the loss; its output, the
    number and the gate before it make the gates. Its weights are learned with the model; slopes are constants. The
    first gates are those of descent at the inner rate. Source: Ravi and Larochelle 2017, equations 2 to 5; for the
    inputs Andrychowicz et al. 2016, arXiv 1606.04474, appendix A.
    """

    def build(self) -> nn.Module:
        rate = self.inner.rate
        assert rate is not None
        self.inner = Inner(self.inner.steps, None)
        like = next(iter(self.start().values()))
        return Gates(int(self.number("hidden")), rate).to(like.device, like.dtype)

    def adapted(self, start: Parameters, support: Batch, inner: Inner) -> Parameters:
        gates = self.beside
        assert isinstance(gates, Gates)
        slope_and_loss = torch.func.grad_and_value(lambda found: self.objective(found, support))
        sizes = [x.numel() for x in start.values()]

        def named(flat: Tensor) -> dict[str, Tensor]:
            parts = torch.split(flat, sizes)
            return {name: part.view(x.shape) for (name, x), part in zip(start.items(), parts, strict=True)}

        cell = torch.cat([x.flatten() for x in start.values()])
        state = gates.first(cell)
        for _ in range(inner.steps):
            with torch.no_grad():
                slopes, loss = slope_and_loss(named(cell))
                slope = torch.cat([slopes[name].flatten() for name in start])
            keep, take, state = gates(slope, loss, cell, state)
            cell = keep * cell - take * slope
        return named(cell)


class Gates(nn.Module):
    """The gates of a step for each number of a model: how much of it stays, and how much of the slope goes off."""

    def __init__(self, hidden: int, rate: float) -> None:
        super().__init__()
        self.hidden = hidden
        self.read = nn.Linear(4 + hidden, 4 * hidden)
        self.keep, self.take = nn.Linear(hidden + 2, 1), nn.Linear(hidden + 2, 1)
        for gate, score in ((self.keep, KEPT), (self.take, math.log(rate / (1 - rate)))):
            nn.init.normal_(gate.weight, std=0.01)
            nn.init.constant_(gate.bias, score)

    def first(self, cell: Tensor) -> tuple[Tensor, ...]:
        """The state before the first step: the output and the memory of the LSTM, and the two gates."""
        zeros = cell.new_zeros(len(cell), self.hidden)
        return zeros, zeros, cell.new_ones(len(cell)), cell.new_zeros(len(cell))

    def forward(self, slope: Tensor, loss: Tensor, cell: Tensor, state: tuple[Tensor, ...]) -> Any:
        """Shares of the number that stay, of the slope that go off, and the next state."""
        output, memory, keep, take = state
        seen = torch.cat([scaled(slope), scaled(loss.expand(len(slope))), output], -1)
        taking, keeping, giving, fresh = self.read(seen).chunk(4, -1)
        memory = keeping.sigmoid() * memory + taking.sigmoid() * fresh.tanh()
        output = giving.sigmoid() * memory.tanh()
        keep, take = (
            gate(torch.cat([output, cell[:, None], before[:, None]], -1)).squeeze(-1).sigmoid()
            for gate, before in ((self.keep, keep), (self.take, take))
        )
        return keep, take, (output, memory, keep, take)


def scaled(x: Tensor) -> Tensor:
    """Two numbers of the order of 1 for each, [n, 2]: size and sign, or -1 and the number itself if it is small."""
    small = x.abs() < math.exp(-SHRINK)
    size = x.abs().clamp_min(math.exp(-SHRINK)).log() / SHRINK
    return torch.stack([torch.where(small, -1.0, size), torch.where(small, math.exp(SHRINK) * x, x.sign())], -1)
