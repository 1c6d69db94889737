"""Arcee Fusion: take over only the changes that matter most, by their size and by how much they change a row."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_lfm.kernels.block import Block, Rows
from mergekit_lfm.kernels.constants import constant
from mergekit_lfm.kernels.derived import derive
from mergekit_lfm.kernels.ranks import magnitudes_of
from mergekit_lfm.kernels.reductions import Reduction
from mergekit_lfm.kernels.sums import Spread
from mergekit_lfm.methods.method import Method, Unit

if TYPE_CHECKING:
    import torch

FLOOR = 1e-8  # added to all probabilities, as in mergekit


@dataclass(frozen=True)
class RowDivergence(Reduction):
    """The Kullback-Leibler divergence of softmax(x) from softmax(base) for rows of `row` elements, float64 [rows].

    Blocks are whole rows of two inputs, the base and x.
    """

    row: int

    def block(self, block: Block) -> torch.Tensor:
        q, p = (block.row(i).double().reshape(-1, self.row).softmax(-1) + FLOOR for i in range(2))
        return (p * (p / q).log() - (p - q)).sum(-1).clamp(min=0)  # p and q have one sum; each term is at least 0

    def add(self, total: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.cat([total, part])


class LocalImportance(NamedTuple):
    """The divergence of each element's row [count], and the threshold, float64."""

    divergence: torch.Tensor
    threshold: torch.Tensor


@dataclass(frozen=True)
class Importance:
    """The divergence of every row of `row` elements, and the importance from which a change is taken over."""

    divergence: torch.Tensor
    row: int
    threshold: float = 0.0

    def at(self, start: int, count: int, dtype: torch.dtype) -> LocalImportance:  # noqa: ARG002
        """The same for the block of `count` elements from index `start`."""
        import torch

        (each,) = Spread(self.divergence[:, None], self.row).at(start, count, torch.float64)
        return LocalImportance(each.contiguous(), constant(self.threshold, torch.float64))


def importance(rows: Rows, _: torch.Tensor | None, local: LocalImportance) -> torch.Tensor:
    """The size of each change times the divergence of its row, float64."""
    return (rows[1] - rows[0]).abs().double() * local.divergence


def _row(unit: Unit) -> int | None:
    """The last axis; a vector is one row."""
    return (unit.shape[-1] if unit.shape else 1) if unit.numel else None


def _solve(unit: Unit) -> Generator[Reduction, Any, Importance]:
    row = _row(unit) or 1
    divergence = yield RowDivergence(row)
    ranks = [unit.numel - int(q * (unit.numel - 1)) for q in (0.25, 0.5, 0.75)]
    ((first, median, third),) = yield from derive(
        magnitudes_of(unit.numel, [ranks], double=True), importance, Importance(divergence, row)
    )
    return Importance(divergence, row, median + 1.5 * (third - first))


def apply(rows: Rows, base: torch.Tensor | None, local: LocalImportance) -> torch.Tensor:
    """The other model's elements whose change has at least the threshold's importance, the base's elsewhere."""
    import torch

    return torch.where(importance(rows, base, local) < local.threshold, rows[0], rows[1])


METHODS = (
    Method(
        name="arcee_fusion",
        source="Arcee Fusion, mergekit's method of this name",
        summary="the base, with those elements of another model whose changes matter most",
        parameters=(),
        base="first",
        inputs=(2, 2),
        solve=_solve,
        apply=apply,
        row=_row,
        sums=lambda unit: unit.numel // (_row(unit) or 1),
        joint=True,
        homogeneous=False,
    ),
)
