"""Weight matching: the permutations that bring the weights nearest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_lfm.methods.kinds import AlignMethod
from mergekit_lfm.methods.method import Parameter

if TYPE_CHECKING:
    from mergekit_lfm.align.request import Aligner, AlignProblem, AlignResult

RESTARTS = Parameter(
    "restarts",
    10,
    kind="int",
    minimum=1,
    doc="how many times to start over with the groups in another random order; the best result is kept",
)
SWEEPS = Parameter("sweeps", 100, kind="int", minimum=1, doc="stop a run after this many rounds over all groups")
SEED = Parameter(
    "seed",
    0,
    kind="int",
    minimum=0,
    maximum=2**64 - 1,
    doc="the number from which the random orders are drawn; the same one gives the same result",
)
NORMALISE = Parameter("normalise", False, kind="bool", doc="divide every tensor by its norm, so that all count alike")


def match_weights(problem: AlignProblem) -> AlignResult:
    """Find permutations by weight matching, the best of several runs.

    The first run starts anchored: it finds each group from tensors whose other axes are free or belong to groups found
    before. The others start from the identity, or `initial`, and visit the groups in random orders, anew for every
    sweep. If `order` is given, every run visits only its groups, and all but the first run follow it. A run ends after
    a sweep without improvement. One run with `initial` or `order` is the paper's algorithm from there. Inside heads,
    queries and keys are permuted if they have no rotary positions.

    Source: Ainsworth, Hayase, Srinivasa 2023 (2209.04836), algorithm 1.
    """
    from mergekit_lfm.align.choices import permutations
    from mergekit_lfm.align.weights import find_best

    return find_best(problem, problem.pair, permutations)


METHODS: tuple[Aligner, ...] = (
    AlignMethod(
        name="weight_matching",
        source="Ainsworth et al. 2023, Git Re-Basin, arXiv 2209.04836, algorithm 1",
        summary="permutations of units that bring the weights nearest",
        parameters=(RESTARTS, SWEEPS, SEED, NORMALISE),
        find=match_weights,
    ),
)
