"""One run of weight matching: increase sum_t <A_t, (g B)_t> over all tensors, one group at a time.

For one group, the others fixed, this sum is <C, g>: C is the sum of unfold(A_t) unfold(B_t)^T over the axes on which
the group acts, the other axes of B_t rewritten by the present elements. The family determines the best g.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

from torch import Tensor

from mergekit_lfm.align.choices import Family, MatchScores, best_units, complete, units_value
from mergekit_lfm.align.heads import best_heads, heads_value
from mergekit_lfm.align.pair import Pair, Use, overflow
from mergekit_lfm.arch.table import Group, Part, Units
from mergekit_lfm.artifacts.transform import Element, HeadsElement, Transform, TransformInfo, UnitsElement

# The relative growth of the sum that earns another sweep. Permutations converge exactly, as in git-re-basin; matrices
# only approach their limit, and 20 sweeps are worth as much as 100.
TOLERANCE, TOLERANCE_OF_MATRICES = 1e-12, 1e-8


class Climb:
    """The element of every group, and the steps that improve it. transform: a live view of these elements."""

    def __init__(self, pair: Pair, allowed: Callable[[Group], Family], start: Mapping[str, Element]) -> None:
        """start: elements to begin with, else the identity. Raises PlanError if one is not in its group's family."""
        self.pair = pair
        groups = pair.symmetries.groups
        self.families = {name: allowed(group) for name, group in groups.items()}
        self.elements = {
            name: complete(group, self.families[name], start.get(name), name, pair.device)
            for name, group in groups.items()
        }
        exact = all(family.units in ("order", "signed") for family in self.families.values())
        self.tolerance = TOLERANCE if exact else TOLERANCE_OF_MATRICES
        self.transform = Transform(pair.symmetries, self.elements, TransformInfo("climb"))

    def scores(self, group: str, uses: Sequence[Use]) -> MatchScores:
        """C, from these uses of a group, with the others as they are now. Raises PlanError if products overflow."""

        def products(use: Use) -> list[tuple[Part, Tensor]]:
            return [(part, x @ y.T) for part, x, y in self.pair.unfolded(use, group, self.transform)]

        scores = MatchScores.of(chain.from_iterable(self.pair.in_order(products, uses)), self.pair.device)
        if not scores.finite:
            raise overflow(f"the products of the weights that read and write {group}")
        return scores

    def visit(self, name: str, uses: Sequence[Use]) -> bool:
        """Replace a group's element by the best for these uses. Returns True if their sum grew."""
        if not uses:
            return False
        group, now = self.pair.symmetries.groups[name], self.elements[name]
        scores = self.scores(name, uses)
        best = best_element(group, self.families[name], scores, now)
        before, after = (value(group, scores, element) for element in (now, best))
        twice = len({tensor for tensor, _ in uses}) < len(uses)
        if twice:  # the group acts on two axes of a tensor: the sum is not linear in it, and C holds for `now` only
            tensors = [tensor for tensor, _ in uses]
            before = self.pair.closeness(self.transform, tensors)[0]
            self.elements[name] = best
            after = self.pair.closeness(self.transform, tensors)[0]
        self.elements[name] = best if after > before else now
        return after - before > self.tolerance * max(abs(before), abs(after))

    def anchor(self, groups: Iterable[str], tick: Callable[[int], None]) -> None:
        """Visit each of these groups once, using only groups visited before it; all other groups count as known."""
        for name, uses in self.pair.anchored(groups):
            self.visit(name, uses)
            tick(1)

    def sweep(self, order: Sequence[str], tick: Callable[[int], None]) -> bool:
        """Visit the groups in this order. Returns True if the sum grew."""
        grew = False
        for name in order:
            grew |= self.visit(name, self.pair.uses(name))
            tick(1)
        return grew


def value(group: Group, scores: MatchScores, element: Element) -> float:
    """<C, element> of a complete element."""
    if isinstance(group, Units):
        assert isinstance(element, UnitsElement)
        return units_value(group, scores, element)
    assert isinstance(element, HeadsElement)
    return heads_value(group, scores, element)


def best_element(group: Group, family: Family, scores: MatchScores, now: Element) -> Element:
    """The element of the family with the greatest known <C, element>. now: a complete element."""
    if isinstance(group, Units):
        assert isinstance(now, UnitsElement)
        return best_units(group, family, scores, now)
    assert isinstance(now, HeadsElement)
    return best_heads(group, family, scores, now)
