"""A checkpoint whose vocabulary has another number of rows: cut, or filled with those of another checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tensors import ITEMSIZE, TensorSpec
from mergekit_lfm.views.base import Maker, ReadRows, Source, View

if TYPE_CHECKING:
    from torch import Tensor

PANEL = 1 << 18  # elements of a panel, about


@final
class Resized(View):
    """The checkpoint with `rows` rows in each of the tensors `names`: fewer, or those of `filler` behind its own."""

    def __init__(self, inner: Checkpoint, names: Collection[str], rows: int, filler: Checkpoint) -> None:
        specs = {
            name: TensorSpec(name, (rows, *spec.shape[1:]), spec.dtype) if name in names else spec
            for name, spec in inner.items()
        }
        self._makers = {
            name: Filled(specs[name], inner[name].shape[0]) for name in names if inner[name].shape[0] < rows
        }
        super().__init__(specs, (inner, filler) if self._makers else (inner,), {"rows": rows}, inner.path)

    def maker(self, name: str) -> Maker | None:
        return self._makers.get(name)


@dataclass(frozen=True, slots=True)
class Filled:
    """The rows of the first checkpoint, and behind its `own` those of the second."""

    spec: TensorSpec
    own: int
    whole: bool = False

    @property
    def sources(self) -> Sequence[Source]:
        return (0, self.spec.name), (1, self.spec.name)

    @property
    def panels(self) -> Sequence[tuple[int, int]]:
        rows, step = self.spec.shape[0], self._step
        return [(first, min(rows, first + step)) for first in range(0, rows, step)]

    @property
    def _step(self) -> int:
        """Rows of a panel."""
        rows = self.spec.shape[0]
        return max(1, min(rows, PANEL * rows // max(1, self.spec.numel)))

    @property
    def scratch(self) -> int:
        row = max(1, self.spec.numel // self.spec.shape[0])
        return self._step * row * (8 + 2 * ITEMSIZE[self.spec.dtype])  # as read, converted, and both together

    def rows(self, first: int, last: int, read: ReadRows) -> Tensor:
        import torch

        parts = [
            read(source, *span).to(getattr(torch, self.spec.dtype))
            for source, span in zip(self.sources, self._spans(first, last), strict=True)
            if span[0] < span[1]
        ]
        return torch.cat(parts)

    def _spans(self, first: int, last: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (first, min(last, self.own)), (max(first, self.own), last)
