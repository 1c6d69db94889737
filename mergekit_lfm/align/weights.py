"""Weight matching: the permutations that bring weights nearest, or the rotations and signs that a Llama allows."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from mergekit_lfm.align.activations import fit_activations
from mergekit_lfm.align.choices import Family, permutations, rotations
from mergekit_lfm.align.climb import Climb
from mergekit_lfm.align.pair import Pair
from mergekit_lfm.align.request import AlignProblem, AlignResult
from mergekit_lfm.arch.table import Group, Heads, Units
from mergekit_lfm.artifacts.transform import Element
from mergekit_lfm.errors import PlanError


def match_weights(request: AlignProblem) -> AlignResult:
    """Find permutations by weight matching, the best of several runs.

    The first run starts anchored: it finds each group from tensors whose other axes are free or belong to groups found
    before. The others start from the identity, or `initial`, and visit the groups in random orders, anew for every
    sweep. If `order` is given, every run visits only its groups, and all but the first run follow it. A run ends after
    a sweep without improvement. One run with `initial` or `order` is the paper's algorithm from there. Inside heads,
    queries and keys are permuted if they have no rotary positions.

    Source: Ainsworth, Hayase, Srinivasa 2023 (2209.04836), algorithm 1.
    """
    return _best_run(request, request.pair, permutations)


def match_rotations(request: AlignProblem) -> AlignResult:
    """Find permutations, and the orthogonal matrices and signs that the table allows, for rotary positions only.

    A residual that can be rotated is aligned by Procrustes, with the gains of the norms folded into their readers;
    others by permutations, with signs if units may change theirs. Values are aligned by Procrustes inside each head,
    each rotary pair of queries and keys by an angle or a sign. Statistics align all but queries and keys by
    activations. Raises PlanError for an architecture without rotary positions.

    Source: 2502.00264 (rotation symmetry), 2506.22712, and Procrustes' solution by polar factors.
    """
    groups = request.pair.symmetries.groups
    heads = [group for group in groups.values() if isinstance(group, Heads)]
    if not heads or any(group.query_key == "linear" for group in heads):
        has = "attention heads without rotary positions" if heads else "no attention heads"
        raise PlanError(
            f"{request.pair.source.label} has {has}; rotation needs a model with rotary positions, such as Llama, "
            "Mistral or Qwen. Use weight_matching or activation_matching, which find permutations"
        )
    rotated = {name for name, group in groups.items() if isinstance(group, Units) and group.rotation == "orthogonal"}
    pair = replace(request.pair, folded=frozenset(rotated))
    if request.moments is not None:
        return AlignResult(pair, fit_activations(request, pair, rotations))
    return _best_run(request, pair, rotations)


def _best_run(request: AlignProblem, pair: Pair, allowed: Callable[[Group], Family]) -> AlignResult:
    unscaled, pair = pair, replace(pair, scales=pair.norms() if request.options["normalise"] else {})
    runs = int(request.number("restarts"))
    plain = runs == 1 and (request.initial is not None or request.order is not None)
    if request.order is not None:
        runs = min(runs, 2)  # the anchored one and another: with a given order all others are the same
    ordered = {name for names in request.order or () for name in names}
    visited = [name for name in pair.symmetries.groups if request.order is None or name in ordered]
    best: tuple[float, dict[str, Element]] | None = None
    for run in range(runs):
        climb = Climb(pair, allowed, request.start)
        if run == 0 and not plain:
            climb.anchor(visited, request.tick)
        for order in _orders(request, run):
            if not climb.sweep(order, request.tick):
                break
        reached = pair.closeness(climb.transform)[0]
        if best is None or reached > best[0]:
            best = reached, climb.elements
    assert best is not None
    return AlignResult(unscaled, best[1], heeded=frozenset({"order", "initial"}))


def _orders(request: AlignProblem, run: int) -> list[Sequence[str]]:
    """The order of the groups in each sweep."""
    sweeps = int(request.number("sweeps"))
    if request.order is not None:
        return list(request.order[:sweeps])
    draw = random.Random(f"{int(request.number('seed'))}/{run}")
    names = list(request.pair.symmetries.groups)
    return [draw.sample(names, len(names)) for _ in range(sweeps)]
