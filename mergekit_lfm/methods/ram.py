"""RAM: average what several models changed, and keep whole what one alone changed."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_lfm.kernels.block import Rows
from mergekit_lfm.kernels.derived import Derived
from mergekit_lfm.kernels.reductions import Reduction, Totals
from mergekit_lfm.kernels.sums import Weights, add_base, add_up
from mergekit_lfm.methods.method import Method, Parameter, Unit, immediate
from mergekit_lfm.methods.task_vectors import LAMBDA

if TYPE_CHECKING:
    import torch


def _count(rows: Rows, epsilon: torch.Tensor) -> tuple[Rows, torch.Tensor]:
    """1 where an input is changed, else 0, for each; and the number of inputs that are."""
    changed = [(x.abs() - epsilon).clamp(min=0).sign() for x in rows]
    return changed, add_up(changed)


def _shared_and_alone(rows: Rows, _: torch.Tensor | None, local: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """For each input 1 where it and another is changed, then for each 1 where it alone is changed. local as `apply`."""
    changed, count = _count(rows, local[1])
    shared = (count - 1).clamp(min=0).sign()
    return (*((x * shared).double() for x in changed), *((x * (1 - shared)).double() for x in changed))


def apply(rows: Rows, base: torch.Tensor | None, local: torch.Tensor) -> torch.Tensor:
    """base + lambda * the mean of the changed entries, times 1 + gain where there is only one.

    local: [lambda, epsilon, gain of each input]. An entry above epsilon is changed.
    """
    changed, count = _count(rows, local[1])
    alone = (2 - count).clamp(min=0)
    total = add_up(x * changed[i] * (alone * local[2 + i] + 1) for i, x in enumerate(rows))
    return add_base(total / count.clamp(min=1) * local[0], base)


def _weights(unit: Unit, gains: Sequence[float]) -> Weights:
    return Weights([unit.number("lambda"), unit.number("epsilon"), *gains])


def _plain(unit: Unit) -> Weights:
    return _weights(unit, [0.0] * len(unit.inputs))


def _solve_plus(unit: Unit) -> Generator[Reduction, Any, Weights]:
    """A gain of r min(alpha, shared / alone), from the numbers of entries that the input changed with others and alone.

    An input without entries of its own has nothing that its gain would be a factor of.
    """
    counts = (yield Derived(_shared_and_alone, _plain(unit), Totals())).tolist()
    n, r, alpha = len(unit.inputs), unit.number("r"), unit.number("alpha")
    pairs = zip(counts[:n], counts[n:], strict=True)
    return _weights(unit, [r * min(alpha, shared / alone) if alone else 0.0 for shared, alone in pairs])


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
        solve=immediate(_plain),
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
        joint=True,
    ),
)
