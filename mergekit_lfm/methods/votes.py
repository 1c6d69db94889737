"""Merges that decide on every element by the models' deltas there alone: MagMax, Consensus, NegMerge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from mergekit_lfm.kernels.block import Rows
from mergekit_lfm.kernels.sums import Weights, add_base, add_up
from mergekit_lfm.methods.method import Method, Parameter, Unit, immediate
from mergekit_lfm.methods.task_vectors import LAMBDA

if TYPE_CHECKING:
    import torch


def keep_largest(rows: Rows, base: torch.Tensor | None, local: torch.Tensor) -> torch.Tensor:
    """base + lambda * the delta of largest magnitude, among equals the last one's.

    Source: MagMax, arXiv 2407.06322; the last of equals as in FusionBench. local: [lambda].
    """
    import torch

    chosen = rows[0]
    for x in rows[1:]:
        chosen = torch.where(chosen.abs() > x.abs(), chosen, x)
    return add_base(chosen * local[0], base)


def keep_shared(rows: Rows, base: torch.Tensor | None, local: torch.Tensor) -> torch.Tensor:
    """base + lambda * the sum of the deltas where at least `agree` models' masks keep it.

    A model's mask keeps |delta| > threshold * |sum - delta|. Source: TALL masks, arXiv 2405.07813, equations 5 and 6.
    local: [lambda, agree - 1, threshold of each input].
    """
    total = add_up(rows)
    masks = [(x.abs() - (total - x).abs() * local[2 + i]).clamp(min=0).sign() for i, x in enumerate(rows)]
    kept = (add_up(masks) - local[1]).clamp(min=0).sign()
    return add_base(total * kept * local[0], base)


def keep_unanimous(rows: Rows, base: torch.Tensor | None, local: torch.Tensor) -> torch.Tensor:
    """base - lambda * the mean of the deltas where all have one sign. Source: NegMerge, arXiv 2410.05583.

    local: [-lambda / n].
    """
    votes = add_up([x.sign() for x in rows]).abs()
    agreed = (votes - (len(rows) - 1)).clamp(min=0)  # 1 if all n votes are equal, none being 0
    return add_base(add_up(rows) * agreed * local[0], base)


def _lambda(unit: Unit) -> Weights:
    return Weights([unit.number("lambda")])


def _masks(unit: Unit) -> Weights:
    return Weights([unit.number("lambda"), unit.number("agree") - 1, *unit.floats("threshold")])


def _negated(unit: Unit) -> Weights:
    return Weights([-unit.number("lambda") / len(unit.inputs)])


def _method(
    name: str,
    source: str,
    summary: str,
    parameters: tuple[Parameter, ...],
    solve: Callable[[Unit], Weights],
    apply: Callable[[Rows, torch.Tensor | None, torch.Tensor], torch.Tensor],
) -> Method:
    return Method(
        name=name,
        source=source,
        summary=summary,
        parameters=parameters,
        base="required",
        inputs=(2, None),
        solve=immediate(solve),
        apply=apply,
    )


METHODS = (
    _method(
        "magmax",
        "Marczak et al. 2024, MagMax, arXiv 2407.06322",
        "of each element the largest change",
        (replace(LAMBDA, default=0.5),),
        _lambda,
        keep_largest,
    ),
    _method(
        "consensus",
        "Wang et al. 2024, Localizing task information (TALL masks, Consensus), arXiv 2405.07813",
        "the summed deltas, only where they matter to several models",
        (
            Parameter(
                "threshold",
                0.4,
                per_input=True,
                minimum=0,
                doc="an element matters to a model if its delta exceeds this times the other models' sum",
            ),
            Parameter(
                "agree", 2, per_input=False, kind="int", minimum=1, doc="models to which an element has to matter"
            ),
            LAMBDA,
        ),
        _masks,
        keep_shared,
    ),
    _method(
        "negmerge",
        "Kim et al. 2024, NegMerge, arXiv 2410.05583",
        "the base less the mean delta where all models agree in sign: to unlearn what they learnt",
        (replace(LAMBDA, doc="factor of the mean delta, which is subtracted"),),
        _negated,
        keep_unanimous,
    ),
)
