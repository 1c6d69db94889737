"""Rotation: permutations, and the other symmetries that a Llama allows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mergekit_lfm.align.methods.weight_matching import NORMALISE, RESTARTS, SEED, SWEEPS
from mergekit_lfm.methods.kinds import AlignMethod

if TYPE_CHECKING:
    from mergekit_lfm.align.request import Aligner, AlignProblem, AlignResult


def match_rotations(problem: AlignProblem) -> AlignResult:
    """Find permutations, and the orthogonal matrices and signs that the table allows, for rotary positions only.

    A residual that can be rotated is aligned by Procrustes, with the gains of the norms folded into their readers;
    others by permutations, with signs if units may change theirs. Values are aligned by Procrustes inside each head,
    each rotary pair of queries and keys by an angle or a sign. Statistics align all but queries and keys by
    activations. Raises PlanError for an architecture without rotary positions.

    Source: 2502.00264 (rotation symmetry), 2506.22712, and Procrustes' solution by polar factors.
    """
    from mergekit_lfm.align.activations import fit_activations
    from mergekit_lfm.align.choices import rotations
    from mergekit_lfm.align.request import AlignResult
    from mergekit_lfm.align.weights import find_best, fold_rotated

    pair = fold_rotated(problem.pair)
    if problem.moments is not None:
        return AlignResult(pair, fit_activations(problem, pair, rotations))
    return find_best(problem, pair, rotations)


METHODS: tuple[Aligner, ...] = (
    AlignMethod(
        name="rotation",
        source="arXiv 2502.00264 (rotation symmetry); arXiv 2506.22712; polar factors by Procrustes",
        summary="for Llama, Mistral, Qwen2, Qwen3: rotations, too",
        parameters=(replace(RESTARTS, default=1), SWEEPS, SEED, replace(NORMALISE, default=True)),
        statistics="optional",
        idle=("restarts", "sweeps", "normalise"),
        rotates=True,
        find=match_rotations,
    ),
)
