"""A folder's model without its weights: names and shapes that are known from its config, and zeros as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

from mergekit_lfm.store.tensors import ITEMSIZE, TensorSpec
from mergekit_lfm.views.base import ReadRows, Source, View, row_count

if TYPE_CHECKING:
    from torch import Tensor

PANEL = 1 << 18  # elements of a panel, about


@final
class Blank(View):
    """Tensors of zeros, with the config and the other files of a folder. The weights in it are not opened."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        super().__init__(specs, (), {"weights": "none"}, path)

    def maker(self, name: str) -> Zeros:
        return Zeros(self[name])

    def name_in_files(self, name: str) -> str:
        return name


@dataclass(frozen=True, slots=True)
class Zeros:
    """Zeros, whatever is read."""

    spec: TensorSpec
    sources: Sequence[Source] = ()
    whole: bool = False

    @property
    def panels(self) -> Sequence[tuple[int, int]]:
        rows, step = row_count(self.spec), self._step
        return [(first, min(rows, first + step)) for first in range(0, rows, step)]

    @property
    def _step(self) -> int:
        """Rows of a panel."""
        rows = row_count(self.spec)
        return max(1, min(rows, PANEL * rows // max(1, self.spec.numel)))

    @property
    def scratch(self) -> int:
        return self._step * (self.spec.numel // row_count(self.spec)) * ITEMSIZE[self.spec.dtype]

    def rows(self, first: int, last: int, read: ReadRows) -> Tensor:  # noqa: ARG002
        import torch

        shape = (last - first, *self.spec.shape[1:]) if self.spec.shape else ()
        return torch.zeros(shape, dtype=getattr(torch, self.spec.dtype))
