"""Weight matching: bring weights nearest, group by group, by permutations or by more that the table allows."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from mergekit_lfm.align.choices import Family
from mergekit_lfm.align.climb import Climb
from mergekit_lfm.align.pair import Pair
from mergekit_lfm.align.request import AlignProblem, AlignResult
from mergekit_lfm.arch.table import Group, Heads, Units
from mergekit_lfm.artifacts.transform import Element
from mergekit_lfm.errors import PlanError


def fold_rotated(pair: Pair) -> Pair:
    """The pair with the gains of norms on rotated groups folded. Raises PlanError without rotary positions."""
    groups = pair.symmetries.groups
    heads = [group for group in groups.values() if isinstance(group, Heads)]
    if not heads or any(group.query_key == "linear" for group in heads):
        has = "attention heads without rotary positions" if heads else "no attention heads"
        raise PlanError(
            f"{pair.source.label} has {has}; rotation needs a model with rotary positions, such as Llama, "
            "Mistral or Qwen. Use weight_matching or activation_matching, which find permutations"
        )
    rotated = {name for name, group in groups.items() if isinstance(group, Units) and group.rotation == "orthogonal"}
    return replace(pair, folded=frozenset(rotated))


def find_best(request: AlignProblem, pair: Pair, allowed: Callable[[Group], Family]) -> AlignResult:
    """The best elements for the weights of several runs, within the families allowed."""
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
