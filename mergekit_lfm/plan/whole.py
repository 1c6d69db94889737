"""Check what only headers show: slices are whole models."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.recipe.form import NOT_YET
from mergekit_lfm.recipe.recipe import Recipe


def refuse_parts(recipe: Recipe, layers: Mapping[str, tuple[int, int]]) -> None:
    """Raise PlanError if a slice is not all layers.

    layers: the index and the number of layers of each tensor of the template in a layer.
    """
    count = max((count for _, count in layers.values()), default=0)
    problems = [
        f"models[{i}].layer_range: found {list(entry.layer_range)}, the models have {count} layers: {NOT_YET['slices']}"
        for i, entry in enumerate(recipe.models)
        if entry.layer_range is not None and entry.layer_range != (0, count)
    ]
    if problems:
        raise PlanError(several("the recipe needs parts of models", problems))
