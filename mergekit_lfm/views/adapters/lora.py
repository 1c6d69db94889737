"""LoRA, and what its variants make of it: a product of two small matrices is added, and DoRA scales the sum.

Source: Hu et al. 2021, arXiv 2106.09685, equation 3; Kalajdzievski 2023, arXiv 2312.03732 (rank stabilisation);
Liu et al. 2024, arXiv 2402.09353, equation 5 (DoRA); Kopiczko et al. 2023, arXiv 2310.11454, equation 2 (VeRA).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.views.adapters.change import Change, Panel

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert of a tensor with all of them: its number of their `count`, and where its rows begin in B's.

    Of PEFT's A, [count * rank, in], an expert has `rank` rows one after another; of B, [out, rank * count], every
    `count`-th column. rows: of B, that are the tensor's.
    """

    number: int
    count: int
    start: int
    rows: int


@dataclass(frozen=True, slots=True)
class LowRank(Change):
    """W + scale B A, with B [out, rank] and A [rank, in]. turned: True if the model stores W as [in, out].

    expert: of a tensor for one expert alone; all of them, [experts, out, in] or turned, are `Experts`.
    """

    a: TensorSpec
    b: TensorSpec
    scale: float
    turned: bool = False
    expert: Expert | None = None

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return self.a, self.b

    def scratch(self, rows: int) -> int:
        return rows * self.a.shape[0]

    def factors(self, panel: Panel) -> tuple[Tensor, Tensor]:
        """B as [out, rank] and A as [rank, in]."""
        a, b = panel.part(self.a), panel.part(self.b)
        if self.expert is None:
            return b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1)
        one = self.expert
        rank = a.shape[0] // one.count
        a = a[one.number * rank : (one.number + 1) * rank]
        return b[one.start : one.start + one.rows, one.number :: one.count], a

    def apply(self, panel: Panel) -> Tensor:
        b, a = self.factors(panel)
        rows = slice(panel.first, panel.last)
        left, right = (a[:, rows].T, b.T) if self.turned else (b[rows], a)
        return panel.x.addmm_(left, right, alpha=self.scale)


@dataclass(frozen=True, slots=True)
class Experts(Change):
    """The same for every expert of a tensor of all, one expert a panel. turned: of [experts, in, out]."""

    a: TensorSpec
    b: TensorSpec
    scale: float
    count: int
    turned: bool

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return self.a, self.b

    def scratch(self, rows: int) -> int:
        return rows * (self.a.numel + self.b.numel) // self.count

    def apply(self, panel: Panel) -> Tensor:
        out, columns = self.b.shape[0], self.a.shape[1]
        for i, number in enumerate(range(panel.first, panel.last)):
            one = LowRank(self.a, self.b, self.scale, self.turned, Expert(number, self.count, 0, out))
            shape = (columns, out) if self.turned else (out, columns)
            x = panel.x[i].view(shape)
            one.apply(Panel(x, 0, shape[0], panel.part, panel.panels, panel.once))
        return panel.x


@dataclass(frozen=True, slots=True)
class Magnitude(Change):
    """DoRA: each output's weights after a LoRA, scaled to the adapter's norm for them, or LyCORIS' for each input's.

    across: True if the model stores these weights as a column, or as columns that follow one another, as those for an
    input of a convolution. The norms of columns take one more pass over the tensor. Norms are summed in float64.
    """

    lora: LowRank
    norms: TensorSpec
    across: bool

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return *self.lora.parts, self.norms

    def scratch(self, rows: int) -> int:
        columns = self.lora.b.shape[0] if self.lora.turned else self.lora.a.numel // max(1, self.lora.a.shape[0])
        return self.lora.scratch(rows) + 3 * rows * columns

    def apply(self, panel: Panel) -> Tensor:
        norms = panel.part(self.norms).flatten()
        if not self.across:
            x = self.lora.apply(panel)
            return x.mul_((norms[panel.first : panel.last] / _norms(x, 1))[:, None])
        before = panel.once(lambda: self._column_norms(panel, len(norms)))
        return self.lora.apply(panel).mul_((norms / before).repeat_interleave(panel.x.shape[1] // len(norms)))

    def _column_norms(self, panel: Panel, count: int) -> Tensor:
        squares = None
        for each in panel.panels():
            x = self.lora.apply(each).double()
            sums = x.square_().sum(0)
            squares = sums if squares is None else squares + sums
        assert squares is not None
        return squares.view(count, -1).sum(1).sqrt_().to(panel.x.dtype)


def _norms(x: Tensor, axis: int) -> Tensor:
    return x.double().square().sum(axis).sqrt_().to(x.dtype)


@dataclass(frozen=True, slots=True)
class Vera(Change):
    """VeRA: W + diag(rows) B diag(ranks) A, with A and B that all layers share, cut to the layer's size."""

    a: TensorSpec
    b: TensorSpec
    ranks: TensorSpec
    rows: TensorSpec
    out: int
    columns: int
    turned: bool
    scale: float = 1.0

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return self.a, self.b, self.ranks, self.rows

    def scratch(self, rows: int) -> int:
        return self.a.numel + self.b.numel + rows * self.a.shape[0]

    def apply(self, panel: Panel) -> Tensor:
        a = panel.part(self.a)[:, : self.columns] * panel.part(self.ranks)[:, None]
        b = panel.part(self.b)[: self.out] * panel.part(self.rows)[:, None]
        rows = slice(panel.first, panel.last)
        left, right = (a[:, rows].T, b.T) if self.turned else (b[rows], a)
        return panel.x.addmm_(left, right, alpha=self.scale)
