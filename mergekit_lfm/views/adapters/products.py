"""LoHa and LoKr: what they add are products of matrices element by element, and of two matrices after Kronecker.

Source: Hyeon-Woo et al. 2021, arXiv 2108.06098, proposition 1 and 3 (LoHa, FedPara); Yeh et al. 2023, arXiv 2309.14859,
section 3.3 (LoKr, LyCORIS). W may be the kernel of a convolution: [out, in, height, width], or of one or three axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.views.adapters.change import Change, Panel

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Factor:
    """A matrix, or the kernel of a convolution, made from tensors of an adapter: (whole,), (a, b) or (core, a, b).

    It is a [out, rank] times b [rank, in]; or, summed over both axes of a core [rank, rank, ...], a [rank, out] on the
    first and b [rank, in] on the second. The rest of a kernel's axes are those of b, or of the core.
    """

    tensors: tuple[TensorSpec, ...]

    @property
    def height(self) -> int:
        return self.tensors[1].shape[1] if len(self.tensors) == 3 else self.tensors[0].shape[0]

    @property
    def width(self) -> int:
        """The numbers in a row."""
        last = self.tensors[-1]
        kernel = self.tensors[0].numel // self.tensors[0].shape[0] ** 2 if len(self.tensors) == 3 else 1
        return last.numel // max(1, last.shape[0]) * kernel

    def make(self, panel: Panel, rows: slice) -> Tensor:
        """Some of its rows, [rows, width]."""
        tensors = [panel.part(spec) for spec in self.tensors]
        if len(tensors) == 1:
            return tensors[0][rows].flatten(1)
        if len(tensors) == 2:
            return tensors[0][rows].flatten(1) @ tensors[1].flatten(1)
        core, a, b = tensors[0].flatten(2), *tensors[1:]
        first = (a[:, rows].T @ core.flatten(1)).view(-1, *core.shape[1:])  # [rows, rank, kernel]
        return (first.mT @ b).mT.flatten(1)  # [rows, in, kernel]


@dataclass(frozen=True, slots=True)
class _Product(Change):
    """W + scale times a product of two factors."""

    one: Factor
    other: Factor
    scale: float

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return *self.one.tensors, *self.other.tensors


@dataclass(frozen=True, slots=True)
class Hadamard(_Product):
    """W + scale (one * other), element by element."""

    def scratch(self, rows: int) -> int:
        return 3 * rows * self.one.width

    def apply(self, panel: Panel) -> Tensor:
        rows = slice(panel.first, panel.last)
        product = self.one.make(panel, rows).mul_(self.other.make(panel, rows))
        return panel.x.add_(product.mul_(self.scale))


@dataclass(frozen=True, slots=True)
class Kronecker(_Product):
    """W + scale (one (x) other): row i of it has row i // m of one, with m rows in other, and row i % m of that."""

    def scratch(self, rows: int) -> int:
        factors = self.one.height * self.one.width + self.other.height * self.other.width
        return factors + 3 * (rows + 2 * self.other.height) * self.one.width * self.other.width

    def apply(self, panel: Panel) -> Tensor:
        one = self.one.make(panel, slice(None))
        other = self.other.make(panel, slice(None))
        m = self.other.height
        first, last = panel.first // m, -(-panel.last // m)
        rows = (one[first:last, None, :, None] * other[None, :, None, :]).reshape((last - first) * m, -1)
        return panel.x.add_(rows[panel.first - first * m : panel.last - first * m].mul_(self.scale))
