"""SCE: select the elements in which the models differ most, weigh the models by their changes there, elect signs."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_lfm.kernels.bits import apply_mask
from mergekit_lfm.kernels.block import Rows
from mergekit_lfm.kernels.constants import constant
from mergekit_lfm.kernels.derived import Derived, derive
from mergekit_lfm.kernels.ranks import NONE, LocalRanks, Ranks, largest_of_nonzero
from mergekit_lfm.kernels.reductions import Reduction, Totals
from mergekit_lfm.kernels.sums import add_base, add_up
from mergekit_lfm.methods.method import Method, Parameter, Unit
from mergekit_lfm.methods.task_vectors import LAMBDA, sum_agreeing

if TYPE_CHECKING:
    import torch


class LocalSelection(NamedTuple):
    """A selection for one block; weights [n] and lambda_ are tensors."""

    kept: LocalRanks | None
    weights: torch.Tensor
    lambda_: torch.Tensor


@dataclass(frozen=True)
class Selection:
    """The coefficients of SCE. kept: ranks of the spread, None for all; weights: of the inputs."""

    kept: Ranks | None
    weights: Sequence[float]
    lambda_: float

    def at(self, start: int, count: int, dtype: torch.dtype) -> LocalSelection:
        """The same for the block of `count` elements from index `start`."""
        import torch

        kept = None if self.kept is None else self.kept.at(start, count, torch.float64)
        return LocalSelection(kept, constant(tuple(self.weights), dtype), constant(self.lambda_, dtype))


def spread(rows: Rows, *_: object) -> torch.Tensor:
    """n^2 times the variance of each element over the n inputs, float64.

    As the sum of all squared differences of two inputs, it is 0 exactly where all are equal.
    """
    wide = [x.double() for x in rows]
    total = wide[0] * 0
    for i, x in enumerate(wide):
        for y in wide[:i]:
            total = total + (x - y) * (x - y)
    return total


def _select(rows: Rows, kept: LocalRanks | None) -> Rows:
    """The inputs, 0 where they are not selected."""
    if kept is None:
        return rows
    mask = kept.mask(0, spread(rows))
    return [apply_mask(x, mask) for x in rows]


def _squares(rows: Rows, _: torch.Tensor | None, local: LocalSelection) -> tuple[torch.Tensor, ...]:
    """The squares of the selected elements."""
    wide = [x.double() for x in _select(rows, local.kept)]
    return tuple(x * x for x in wide)


def _solve(unit: Unit) -> Generator[Reduction, Any, Selection]:
    even = [1.0 / len(unit.inputs)] * len(unit.inputs)
    kept, share, lambda_ = None, unit.number("select_topk"), unit.number("lambda")
    if share < 1:
        kept = Ranks([((yield from derive(largest_of_nonzero(unit.numel, share, double=True), spread)), NONE)])
    squares = (yield Derived(_squares, Selection(kept, even, lambda_), Totals())).tolist()
    total = sum(squares)
    return Selection(kept, [x / total for x in squares] if total else even, lambda_)


def apply(rows: Rows, base: torch.Tensor | None, c: LocalSelection) -> torch.Tensor:
    """base + lambda * the mean, by the weights, of the selected deltas that agree with the sign of their sum.

    Source: FuseChat, arXiv 2408.07990; the variance and the weights as in mergekit's method of this name.
    """
    deltas = _select(rows, c.kept)
    terms = [delta * c.weights[i] for i, delta in enumerate(deltas)]
    merged = sum_agreeing(terms, add_up(deltas), c.weights, normalize=True, zero_is_positive=True)
    return add_base(merged * c.lambda_, base)


METHODS = (
    Method(
        name="sce",
        source="Wan et al. 2024, FuseChat, arXiv 2408.07990",
        summary="the elements in which the models differ most, models weighted by their squared changes, signs elected",
        parameters=(
            Parameter(
                "select_topk",
                1.0,
                per_input=False,
                minimum=0,
                maximum=1,
                doc="fraction to keep of a tensor's elements in which the models differ, those of largest variance",
            ),
            LAMBDA,
        ),
        base="required",
        inputs=(1, None),
        solve=_solve,
        apply=apply,
        joint=True,
    ),
)
