"""Planning slices takes as long as planning models: each model is looked at once, each tensor in its slice alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers_stacks import make_stack, place, source, stack

from mergekit_lfm.plan.layers import Place, find_places
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.plan.match import match_tensors
from mergekit_lfm.plan.roles import PartRoles
from mergekit_lfm.recipe.recipe import Recipe


@pytest.mark.parametrize("module", [False, True])
def test_more_slices_are_not_more_work(module: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that are taken apart, and the tensors that are matched, of 2 and of 24 slices."""
    for seed, name in enumerate("ab"):
        make_stack(tmp_path, name, seed, layers=24)
    seen = list[str]()
    find, match = find_places, match_tensors

    def counted_places(names: Iterable[str]) -> dict[str, Place]:
        names = list(names)
        seen.extend(names)
        return find(names)

    def counted_match(roles: PartRoles, kept: Mapping[str, int]) -> Any:
        seen.extend(roles.models[0])
        return match(roles, kept)

    monkeypatch.setattr("mergekit_lfm.plan.stack.find_places", counted_places)
    monkeypatch.setattr("mergekit_lfm.plan.layers.find_places", counted_places)
    monkeypatch.setattr("mergekit_lfm.plan.make.match_tensors", counted_match)
    counts = []
    for width in (12, 1):
        cuts = [[source(name, i, i + width) for name in "ab"] for i in range(0, 24, width)]
        recipe = stack(*cuts, merge_method="linear", parameters={"weight": 1.0})
        if module:
            slices = recipe.pop("slices")
            recipe = {**recipe, "modules": {"default": {"slices": slices}}, "base_model": "a"}
        plan = make_plan(Recipe.parse(place(recipe, tmp_path)))
        assert len(plan.tensors) == 24 * 2 + 3
        counts.append(len(seen))
        seen.clear()
    assert counts[0] == counts[1] > 100
