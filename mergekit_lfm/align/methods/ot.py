"""Optimal transport of units."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_lfm.align.methods.weight_matching import SEED
from mergekit_lfm.methods.kinds import AlignMethod
from mergekit_lfm.methods.method import Parameter

if TYPE_CHECKING:
    from mergekit_lfm.align.request import Aligner, AlignProblem, AlignResult


def transport(problem: AlignProblem) -> AlignResult:
    """Transport each group by the optimal plan between the units of both models, given the groups before it.

    Source: Singh and Jaggi 2020 (1910.05653), algorithm 1.
    """
    from mergekit_lfm.align.transport import transport_units

    return transport_units(problem)


METHODS: tuple[Aligner, ...] = (
    AlignMethod(
        name="ot",
        source="Singh and Jaggi 2020, Model fusion via optimal transport, arXiv 1910.05653, algorithm 1",
        summary="optimal transport of units; widths may differ; soft",
        parameters=(
            Parameter(
                "regularisation",
                0.0,
                minimum=0,
                doc="the strength of Sinkhorn's smoothing; 0 finds the exact transport",
            ),
            Parameter(
                "cost",
                "euclidean",
                kind="str",
                choices=("euclidean", "squared", "cosine"),
                doc="the distance between two units",
            ),
            SEED,
        ),
        statistics="optional",
        starts=False,
        widths=True,
        find=transport,
    ),
)
