"""RAM: average what several models changed, and keep whole what one alone changed."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_lfm.kernels.block import Rows
from mergekit_lfm.kernels.constants import constant
from mergekit_lfm.kernels.derived import Derived
from mergekit_lfm.kernels.reductions import Reduction, Totals
from mergekit_lfm.methods.method import Method, Parameter, Unit
from mergekit_lfm.methods.task_vectors import LAMBDA

if TYPE_CHECKING:
    import torch


class LocalGains(NamedTuple):
    """One number each, and the gains [n]."""

    epsilon: torch.Tensor
    gains: torch.Tensor
    lambda_: torch.Tensor


@dataclass(frozen=True)
class Gains:
    """The coefficients of RAM, the same for every block.

    epsilon: an entry above it is changed. gains: the factors, less 1, of what an input alone changed.
    """

    epsilon: float
    gains: Sequence[float]
    lambda_: float

    def at(self, start: int, count: int, dtype: torch.dtype) -> LocalGains:  # noqa: ARG002
        """The coefficients as tensors."""
        return LocalGains(
            constant(self.epsilon, dtype), constant(tuple(self.gains), dtype), constant(self.lambda_, dtype)
        )


def _count(rows: Rows, epsilon: torch.Tensor) -> tuple[Rows, torch.Tensor]:
    """1 where an input is changed, else 0, for each; and the number of inputs that are."""
    changed = [(x.abs() - epsilon).clamp(min=0).sign() for x in rows]
    count = changed[0]
    for each in changed[1:]:
        count = count + each
    return changed, count


def _shared_and_alone(rows: Rows, _: torch.Tensor | None, local: LocalGains) -> tuple[torch.Tensor, ...]:
    """For each input 1 where it and another is changed, then for each 1 where it alone is changed."""
    changed, count = _count(rows, local.epsilon)
    shared = (count - 1).clamp(min=0).sign()
    return (*((x * shared).double() for x in changed), *((x * (1 - shared)).double() for x in changed))


def apply(rows: Rows, base: torch.Tensor | None, c: LocalGains) -> torch.Tensor:
    """base + lambda * the mean of the changed entries, times 1 + gain where there is only one."""
    changed, count = _count(rows, c.epsilon)
    alone = (2 - count).clamp(min=0)
    total = rows[0] * changed[0] * (alone * c.gains[0] + 1)
    for i in range(1, len(rows)):
        total = total + rows[i] * changed[i] * (alone * c.gains[i] + 1)
    total = total / count.clamp(min=1) * c.lambda_
    return total if base is None else total.add_(base)


def _solve(unit: Unit) -> Generator[Reduction, Any, Gains]:
    return Gains(unit.number("epsilon"), [0.0] * len(unit.inputs), unit.number("lambda"))
    yield  # asks for nothing


def _solve_plus(unit: Unit) -> Generator[Reduction, Any, Gains]:
    """A gain of r min(alpha, shared / alone), from the numbers of entries that the input changed with others and alone.

    An input without entries of its own has nothing that its gain would be a factor of.
    """
    plain = yield from _solve(unit)
    counts = (yield Derived(_shared_and_alone, plain, Totals())).tolist()
    n, r, alpha = len(unit.inputs), unit.number("r"), unit.number("alpha")
    gains = [
        r * min(alpha, shared / alone) if alone else 0.0 for shared, alone in zip(counts[:n], counts[n:], strict=True)
    ]
    return Gains(plain.epsilon, gains, plain.lambda_)


EPSILON = Parameter(
    "epsilon", 1e-5, per_input=False, minimum=0, absolute=True, doc="an entry of a delta above this size is changed"
)
SOURCE = "Yuan et al. 2026, Behavior knowledge merge in reinforced agentic models, arXiv 2601.13572"

METHODS = (
    Method(
        name="ram",
        source=SOURCE,
        summary="each element's mean over the models that changed it",
        parameters=(EPSILON, LAMBDA),
        base="required",
        inputs=(1, None),
        solve=_solve,
        apply=apply,
    ),
    Method(
        name="ramplus_tl",
        source=SOURCE,
        summary="as `ram`, and what one model alone changed is amplified, by how much it shares with others",
        parameters=(
            EPSILON,
            Parameter("r", 0.1, per_input=False, minimum=0, doc="amplification for each unit of shared / alone"),
            Parameter("alpha", 0.2, per_input=False, minimum=0, doc="largest shared / alone that counts"),
            LAMBDA,
        ),
        base="required",
        inputs=(1, None),
        solve=_solve_plus,
        apply=apply,
    ),
)
