"""Model Stock: how far to go from the base towards the average, from the angle between the fine-tunes."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from mergekit_lfm.kernels.reductions import Gram, Reduction, RowGram
from mergekit_lfm.kernels.sums import Spread, Weights, weighted_sum
from mergekit_lfm.methods.method import Method, Parameter, Unit
from mergekit_lfm.methods.task_vectors import LAMBDA

if TYPE_CHECKING:
    import torch

COSINE_RESOLUTION = 1e-6  # of cosines: float32 deltas of opposite directions do not cancel more exactly


def _row(unit: Unit) -> int | None:
    return unit.shape[-1] if unit.shared["filter_wise"] and len(unit.shape) > 1 and unit.numel else None


def _sums(unit: Unit) -> int:
    row = _row(unit)
    return 0 if row is None else unit.numel // row * len(unit.inputs) ** 2


def ratio(gram: torch.Tensor) -> torch.Tensor:
    """t of the interpolation base + t (mean - base), from the Gram matrices [..., n, n] of the deltas.

    t = n c / (1 + (n - 1) c) with c the mean cosine over pairs (Jang et al. 2024, equation 7); 0 where the denominator
    is less than COSINE_RESOLUTION: opposite deltas have no ratio.
    """
    import torch

    n = gram.shape[-1]
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    lengths = torch.where(norms > 0, norms, 1.0)  # a delta of 0 has no direction, and a cosine of 0 with all others
    cosine = (gram / lengths[..., :, None] / lengths[..., None, :]).clamp(-1, 1)
    i, j = torch.triu_indices(n, n, offset=1, device=gram.device)
    mean = cosine[..., i, j].mean(-1)
    below = 1 + (n - 1) * mean
    return torch.where(below.abs() < COSINE_RESOLUTION, 0.0, n * mean / below)


def _solve(unit: Unit) -> Generator[Reduction, Any, Weights | Spread]:
    n, row = len(unit.inputs), _row(unit)
    gram = yield (Gram() if row is None else RowGram(row))
    weights = ratio(gram)[..., None].expand(*gram.shape[:-1]) / n * unit.number("lambda")
    return Weights(weights.tolist()) if row is None else Spread(weights, row, first=unit.start)


METHODS = (
    Method(
        name="model_stock",
        source="Jang et al. 2024, Model Stock, arXiv 2403.19522, equation 7",
        summary="from the base towards the average of the fine-tunes, as far as the angles between them say",
        parameters=(
            Parameter(
                "filter_wise", False, per_input=False, kind="bool", doc="one ratio for every row, not per tensor"
            ),
            LAMBDA,
        ),
        base="required",
        inputs=(2, None),
        solve=_solve,
        apply=weighted_sum,
        version=2,
        row=_row,
        by_row=lambda unit: _row(unit) is not None,
        sums=_sums,
    ),
)
