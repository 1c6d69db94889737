"""Activation matching: pair units by how their activations correlate on data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_lfm.align.methods.weight_matching import SEED
from mergekit_lfm.methods.kinds import AlignMethod

if TYPE_CHECKING:
    from mergekit_lfm.align.request import Aligner, AlignProblem, AlignResult


def match_activations(problem: AlignProblem) -> AlignResult:
    """Find permutations from correlations of activations, summed over the layers that read a group.

    Heads, and the values inside each, are paired by the inputs of the next layer; no layer reads queries and keys, so
    they are paired by weights, with all else fixed. A constant unit counts as uncorrelated with every other.
    Raises PlanError with the groups that no covered layer reads.

    Source: Ainsworth, Hayase, Srinivasa 2023 (2209.04836), section 3.1; Li et al. 2016 (1511.07543).
    """
    from mergekit_lfm.align.activations import fit_activations
    from mergekit_lfm.align.choices import permutations
    from mergekit_lfm.align.request import AlignResult

    return AlignResult(problem.pair, fit_activations(problem, problem.pair, permutations))


METHODS: tuple[Aligner, ...] = (
    AlignMethod(
        name="activation_matching",
        source="Ainsworth et al. 2023, arXiv 2209.04836, section 3.1; Li et al. 2016, arXiv 1511.07543",
        summary="permutations that pair units by their activations",
        parameters=(SEED,),
        statistics="required",
        starts=False,
        find=match_activations,
    ),
)
