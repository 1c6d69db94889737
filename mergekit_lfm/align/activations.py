"""Activation matching: units are paired by how their activations go together on data, each group by itself."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mergekit_lfm.align.choices import Family, Scores, permutations
from mergekit_lfm.align.climb import Climb, best_element
from mergekit_lfm.align.correlations import Block
from mergekit_lfm.align.heads import best_query_key
from mergekit_lfm.align.pair import Pair, overflow
from mergekit_lfm.align.request import Found, Request
from mergekit_lfm.arch.table import Group, Heads
from mergekit_lfm.artifacts.transform import Element, HeadsElement


def match_activations(request: Request) -> Found:
    """Permutations by the correlations of activations, summed over the layers that read a group.

    Heads are paired by what the layer after them reads, and the values inside of each with them; queries and keys are
    read by no layer, and are paired by weights given all else. A unit that does not vary counts as correlated with
    none. PlanError names the groups that no covered layer reads.

    Source: Ainsworth, Hayase, Srinivasa 2023 (2209.04836), section 3.1; Li et al. 2016 (1511.07543).
    """
    assert request.moments is not None
    return Found(request.pair, fit_activations(request, request.pair, permutations))


def fit_activations(request: Request, pair: Pair, allowed: Callable[[Group], Family]) -> dict[str, Element]:
    """The element of every group by the moments of what reads it, queries and keys by weights given all others.

    Orders and signs go by correlations; orthogonal matrices by E x y^T (Procrustes of the activations themselves),
    before the gain of a folded norm, and of equal size for every layer and head. Each group is found by itself, so an
    order of groups and a start do not matter. PlanError where products of the moments overflow.
    """
    assert request.moments is not None
    request.moments.require(pair, pair.symmetries.groups)
    climb = Climb(pair, allowed, {})
    for name, group in pair.symmetries.groups.items():
        blocks = request.moments.of(pair, name)
        if blocks:
            family = climb.families[name]
            measured = ((block.part, _measure(pair, group, family, block)) for block in blocks)
            scores = Scores.of(measured, pair.device)
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


def _measure(pair: Pair, group: Group, family: Family, block: Block) -> Tensor:
    """How the units of a block go together, [units, units]."""
    if isinstance(group, Heads):
        return block.product(size=group.head_dim) if family.value_output == "orthogonal" else block.correlation()
    return block.product(pair.gains.get(block.part.norm or "")) if family.units == "orthogonal" else block.correlation()
