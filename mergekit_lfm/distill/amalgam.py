"""Several teachers of other classes each, as one teacher of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mergekit_lfm.runtime.load import logits, run


class Amalgam(nn.Module):
    """Teachers whose scores stand side by side, in their order. Source: Ye et al. 2020, arXiv 2003.09088, eq. 10."""

    def __init__(self, teachers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)

    def forward(self, images: Tensor) -> Tensor:
        """The scores [n, classes of all]."""
        return torch.cat([logits(run(each, (images,))) for each in self.teachers], -1)


def teachers_of(model: nn.Module) -> list[nn.Module]:
    """The teachers in a model: those of an amalgam, or itself."""
    return [*model.teachers] if isinstance(model, Amalgam) else [model]
