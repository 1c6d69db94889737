"""Fisher merging: average each parameter, weighted by each model's certainty of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mergekit_lfm.errors import PlanError
from mergekit_lfm.kernels.block import Rows
from mergekit_lfm.kernels.constants import constant
from mergekit_lfm.methods.linear import normalise
from mergekit_lfm.methods.method import Method, Parameter, Unit, immediate

if TYPE_CHECKING:
    import torch


class LocalFisher(NamedTuple):
    """One of each for every input, [n]."""

    factors: torch.Tensor
    floors: torch.Tensor
    priors: torch.Tensor


@dataclass(frozen=True)
class FisherAverage:
    """The coefficients of a Fisher merge: the same for every block.

    The share of input i is factors[i] F_i + floors[i], or priors[i], which sum to 1, where all shares are 0.
    """

    factors: Sequence[float]
    floors: Sequence[float]
    priors: Sequence[float]

    def at(self, start: int, count: int, dtype: torch.dtype) -> LocalFisher:  # noqa: ARG002
        """The coefficients as tensors."""
        return LocalFisher(*(constant(tuple(x), dtype) for x in (self.factors, self.floors, self.priors)))


@immediate
def _solve(unit: Unit) -> FisherAverage:
    weights = unit.floats("weight")
    if not any(weights):
        raise PlanError(f"{unit.name}: all weights are 0; give at least one model a weight above 0")
    norms = [1.0] * len(weights)
    if unit.shared["normalize"]:
        if unit.numel and not all(unit.norms):
            raise PlanError(
                f"{unit.name}: the Fisher information of an input is 0 everywhere and cannot be normalised; collect it "
                "on other data, or set `normalize: false`"
            )
        norms = [norm or 1.0 for norm in unit.norms]
    scales = [weight / norm for weight, norm in zip(weights, norms, strict=True)]
    largest = max(scales)  # becomes 1, so that no share overflows
    floors = [unit.number("epsilon") * weight / largest for weight in weights]
    return FisherAverage([scale / largest for scale in scales], floors, normalise(weights, unit, switch=None))


def apply(rows: Rows, base: torch.Tensor | None, local: LocalFisher) -> torch.Tensor:  # noqa: ARG001
    """sum_i p_i x_i with p_i = l_i (F_i + e) / sum_k l_k (F_k + e) (Matena and Raffel 2022, section 3).

    Where all F_i and e are 0, p_i is its limit for e towards 0, l_i / sum_k l_k.
    """
    n = len(rows) // 2
    shares = [rows[n + i] * local.factors[i] + local.floors[i] for i in range(n)]
    total = shares[0] + 0.0
    for share in shares[1:]:
        total = total + share
    unknown = 1 - total.sign()  # 1 where no model has information, else 0
    total = total + unknown
    merged = (shares[0] + local.priors[0] * unknown) / total * rows[0]
    for i in range(1, n):
        merged = merged + (shares[i] + local.priors[i] * unknown) / total * rows[i]
    return merged


METHODS = (
    Method(
        name="fisher",
        source="Matena and Raffel 2022, Merging models with Fisher-weighted averaging, arXiv 2111.09832",
        summary="average weighted for each parameter by its diagonal Fisher information; needs `stats` for each model",
        parameters=(
            Parameter("weight", 1.0, per_input=True, minimum=0, doc="factor of the model's Fisher information"),
            Parameter(
                "epsilon",
                0.0,
                per_input=False,
                minimum=0,
                doc="added to the Fisher information, after `normalize`; parameters without any are averaged by weight",
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
        version=2,
        statistics="fisher",
    ),
)
