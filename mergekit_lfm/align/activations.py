"""Activation matching: pair units by how their activations correlate on data, each group by itself."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mergekit_lfm.align.choices import Family, MatchScores
from mergekit_lfm.align.climb import Climb, best_element
from mergekit_lfm.align.correlations import UnitMoments
from mergekit_lfm.align.heads import best_query_key
from mergekit_lfm.align.pair import Pair, overflow
from mergekit_lfm.align.request import AlignProblem
from mergekit_lfm.arch.table import Group, Heads
from mergekit_lfm.artifacts.transform import Element, HeadsElement


def fit_activations(request: AlignProblem, pair: Pair, allowed: Callable[[Group], Family]) -> dict[str, Element]:
    """Fit every group to the moments of the layers that read it; queries and keys to weights, with all else fixed.

    Orders and signs use correlations; orthogonal matrices E x y^T (Procrustes of the activations themselves), before
    the gain of a folded norm, scaled alike for every layer and head. Each group is fitted by itself, so neither the
    order of groups nor a start matters. Raises PlanError if products of the moments overflow.
    """
    assert request.moments is not None
    request.moments.require(pair, pair.symmetries.groups)
    climb = Climb(pair, allowed, {})
    for name, group in pair.symmetries.groups.items():
        blocks = request.moments.of(pair, name)
        if blocks:
            family = climb.families[name]
            measured = ((block.part, _measure(pair, group, family, block)) for block in blocks)
            scores = MatchScores.of(measured, pair.device)
            if not scores.finite:
                raise overflow(f"the products of the moments of {name}")
            climb.elements[name] = best_element(group, family, scores, climb.elements[name])
        request.tick(1)
    for name, group in pair.symmetries.groups.items():
        now, family = climb.elements[name], climb.families[name]
        if isinstance(group, Heads) and isinstance(now, HeadsElement) and family.query_key != "fixed":
            scores = climb.scores(name, pair.uses(name, ("query", "key")))
            climb.elements[name] = best_query_key(group, family, scores, now)
    return climb.elements


def _measure(pair: Pair, group: Group, family: Family, block: UnitMoments) -> Tensor:
    """How well each unit of one model matches each of the other, [units, units]."""
    if isinstance(group, Heads):
        return block.product(size=group.head_dim) if family.value_output == "orthogonal" else block.correlation()
    return block.product(pair.gains.get(block.part.norm or "")) if family.units == "orthogonal" else block.correlation()
