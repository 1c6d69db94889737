"""Check what only headers and tokenizers show: slices are whole models, and all tokenizers are one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.recipe.form import NOT_YET
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tokens import find_tokens


def refuse_parts(
    recipe: Recipe, models: Sequence[Checkpoint], labels: Sequence[str], layers: Mapping[str, tuple[int, int]]
) -> None:
    """Raise PlanError if a slice is not all layers, or a tokenizer would have to be built.

    layers: the index and the number of layers of each tensor of the template in a layer.
    """
    count = max((count for _, count in layers.values()), default=0)
    problems = [
        f"models[{i}].layer_range: found {list(entry.layer_range)}, the models have {count} layers: {NOT_YET['slices']}"
        for i, entry in enumerate(recipe.models)
        if entry.layer_range is not None and entry.layer_range != (0, count)
    ]
    if recipe.tokenizer_source is not None:
        tokens = [find_tokens(model) for model in models]
        first = tokens[0]
        problems += [
            f"tokenizer_source: {labels[i]} and {labels[0]} have other tokenizers: {NOT_YET['tokenizer_source']}"
            for i, other in enumerate(tokens)
            if (other is None) != (first is None)
            or (other is not None and first is not None and other.digest != first.digest and other.by_id != first.by_id)
        ]
    if problems:
        raise PlanError(several("the recipe needs parts of models", problems))
