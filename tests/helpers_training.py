"""Small modules and data for the training loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mergekit_lfm.train.examples import Examples


class Net(nn.Module):
    """A line, or two layers with dropout between them."""

    def __init__(self, deep: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(5)
        width = 7 if deep else 1
        self.first = nn.Linear(5, width, dtype=dtype)
        self.second = nn.Linear(width, 1, dtype=dtype) if deep else nn.Identity()
        self.drop = nn.Dropout(0.3 if deep else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.drop(self.first(x)))
        return out.squeeze(-1)


def data(count: int = 24, dtype: torch.dtype = torch.float64) -> Examples:
    torch.manual_seed(0)
    x = torch.randn(count, 5, dtype=dtype)
    y = x @ torch.arange(1.0, 6.0, dtype=dtype) + 0.1 * torch.randn(count, dtype=dtype) + 2
    return Examples([{"x": a, "labels": b} for a, b in zip(x, y, strict=True)])


def numbers(model: nn.Module) -> Tensor:
    return torch.cat([x.detach().flatten() for x in model.parameters()])


class Killed(BaseException):
    """The end of a process."""
