"""PCB: let the parameters compete, within each model by size and across the models by agreement."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_lfm.kernels.block import Rows
from mergekit_lfm.kernels.constants import constant
from mergekit_lfm.kernels.derived import derive
from mergekit_lfm.kernels.ranks import magnitudes_of
from mergekit_lfm.kernels.reductions import Reduction
from mergekit_lfm.kernels.series import exp
from mergekit_lfm.kernels.sums import add_base, add_up
from mergekit_lfm.methods.method import Method, Parameter, Unit
from mergekit_lfm.methods.task_vectors import LAMBDA, SCOPE, scope_of

if TYPE_CHECKING:
    import torch

OUTLIERS = 1e-4  # the share of entries at either end of a delta's magnitudes that count as the one at this rank


class LocalBalance(NamedTuple):
    """One number for each input, [n] float64, and lambda in the block's dtype."""

    low: torch.Tensor
    high: torch.Tensor
    floor: torch.Tensor
    top: torch.Tensor
    lambda_: torch.Tensor


@dataclass(frozen=True)
class Balance:
    """The coefficients of PCB, for each input: the ends of its magnitudes, and of the scores that count."""

    low: Sequence[float]
    high: Sequence[float]
    floor: Sequence[float]
    top: Sequence[float]
    lambda_: float

    def at(self, start: int, count: int, dtype: torch.dtype) -> LocalBalance:  # noqa: ARG002
        """The coefficients as tensors."""
        import torch

        low, high, floor, top = (constant(tuple(x), torch.float64) for x in (self.low, self.high, self.floor, self.top))
        return LocalBalance(low, high, floor, top, constant(self.lambda_, dtype))


def _share(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """x from `low` to `high` as 0 to 1; 0 if they are equal."""
    width = high - low
    return (x - low) / (width + (1 - width.sign()))


def _size(x: torch.Tensor, i: int, c: LocalBalance) -> torch.Tensor:
    """The magnitudes of input i, none below or above its ends, float64."""
    import torch

    size = x.double().abs()
    size = torch.where(size < c.low[i], c.low[i], size)
    return torch.where(size > c.high[i], c.high[i], size)


def scores(rows: Rows, _: torch.Tensor | None, c: LocalBalance) -> tuple[torch.Tensor, ...]:
    """exp(n size^2) * delta * sum of the deltas, for each input, float64; 0 where the delta opposes the sum."""
    total, n, found = add_up(x.double() for x in rows), len(rows), []
    for i, x in enumerate(rows):
        share = _share(_size(x, i, c), c.low[i], c.high[i])
        found.append(exp(share * share * n, n) * (x.double() * total).clamp(min=0))
    return tuple(found)


def _solve(unit: Unit) -> Generator[Reduction, Any, Balance]:
    n, numel = len(unit.inputs), unit.numel
    ends = [numel - int(numel * OUTLIERS), numel - int(numel * (1 - OUTLIERS) - 1)]
    low, high = zip(*(yield from magnitudes_of(numel, [ends] * n, double=unit.double)), strict=True)
    none = [0.0] * n
    balance = Balance(low, high, none, none, unit.number("lambda"))
    least = max(1, numel - int(numel * (1 - unit.number("density"))))
    found = yield from derive(magnitudes_of(numel, [[least, 1]] * n, double=True), scores, balance)
    floor, top = zip(*found, strict=True)
    return replace(balance, floor=floor, top=top)


def apply(rows: Rows, base: torch.Tensor | None, c: LocalBalance) -> torch.Tensor:
    """base + lambda * the mean of the deltas, weighted by the scores above the floor as 0 to 1.

    Source: PCB-Merging, arXiv 2410.02396, and its authors' code.
    """
    weights = [_share(score, c.floor[i], c.top[i]).clamp(min=0) for i, score in enumerate(scores(rows, None, c))]
    total = add_up(_size(x, i, c) * x.sign().double() * weights[i] for i, x in enumerate(rows))
    weight = add_up(weights)
    merged = (total / (weight + (1 - weight.sign()))).to(rows[0].dtype)
    return add_base(merged * c.lambda_, base)


METHODS = (
    Method(
        name="pcb",
        source="Du et al. 2024, Parameter competition balancing (PCB-Merging), arXiv 2410.02396",
        summary="the entries of each delta with the best scores, for size and agreement; their mean by score",
        parameters=(
            Parameter(
                "density", 0.1, per_input=False, above=0, maximum=1, doc="fraction of each model's entries to keep"
            ),
            replace(LAMBDA, default=1.2),
            replace(SCOPE, default="global", doc="ranks in each tensor, or over the whole model as in the paper"),
        ),
        base="required",
        inputs=(1, None),
        solve=_solve,
        apply=apply,
        scope=scope_of,
        joint=True,
    ),
)
