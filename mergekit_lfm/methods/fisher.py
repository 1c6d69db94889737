"""Fisher merging: average each parameter, weighted by each model's certainty of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mergekit_lfm.errors import PlanError
from mergekit_lfm.kernels.block import Rows
from mergekit_lfm.kernels.constants import constant
from mergekit_lfm.methods.method import Method, Parameter, Unit, immediate

if TYPE_CHECKING:
    import torch


class LocalFisher(NamedTuple):
    """scales: one for each input, [n]. floor: a number, []."""

    scales: torch.Tensor
    floor: torch.Tensor


@dataclass(frozen=True)
class FisherAverage:
    """The coefficients of a Fisher merge: the same for every block."""

    scales: list[float]
    floor: float

    def at(self, start: int, count: int, dtype: torch.dtype) -> LocalFisher:  # noqa: ARG002
        """The coefficients as tensors."""
        return LocalFisher(constant(tuple(self.scales), dtype), constant(self.floor, dtype))


@immediate
def _solve(unit: Unit) -> FisherAverage:
    scales = unit.floats("weight")
    if not any(scales):
        raise PlanError(f"{unit.name}: all weights are 0; give at least one model a weight above 0")
    if unit.shared["normalize"]:
        if unit.numel and not all(unit.norms):
            raise PlanError(
                f"{unit.name}: the Fisher information of an input is 0 everywhere and cannot be normalised; collect it "
                "on other data, or set `normalize: false`"
            )
        scales = [scale / (norm or 1.0) for scale, norm in zip(scales, unit.norms, strict=True)]
        scales = [scale / max(scales) for scale in scales]
    return FisherAverage(scales, unit.number("epsilon"))


def apply(rows: Rows, base: torch.Tensor | None, local: LocalFisher) -> torch.Tensor:  # noqa: ARG001
    """sum_i p_i x_i with p_i = l_i (F_i + e) / sum_k l_k (F_k + e) (Matena and Raffel 2022, section 3)."""
    n = len(rows) // 2
    shares = [(rows[n + i] + local.floor) * local.scales[i] for i in range(n)]
    total = shares[0] + 0.0
    for share in shares[1:]:
        total = total + share
    merged = shares[0] / total * rows[0]
    for share, x in zip(shares[1:], rows[1:n], strict=True):
        merged = merged + share / total * x
    return merged


METHODS = (
    Method(
        name="fisher",
        source="Matena and Raffel 2022, Merging models with Fisher-weighted averaging, arXiv 2111.09832",
        summary="average weighted for each parameter by its diagonal Fisher information; needs `stats` for each model",
        parameters=(
            Parameter("weight", 1.0, per_input=True, minimum=0, doc="factor of the model's Fisher information"),
            Parameter(
                "epsilon", 1e-6, per_input=False, minimum=1e-37, doc="added to the Fisher information, which may be 0"
            ),
            Parameter(
                "normalize",
                False,
                per_input=False,
                kind="bool",
                doc="divide each model's Fisher information by its norm over the whole model",
            ),
        ),
        base="member",
        inputs=(1, None),
        solve=_solve,
        apply=apply,
        statistics="fisher",
    ),
)
