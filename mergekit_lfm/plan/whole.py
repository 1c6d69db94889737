"""Check what only tokenizers show: that all of them are one."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.recipe.form import NOT_YET
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tokens import find_tokens


def refuse_other_tokenizers(recipe: Recipe, models: Sequence[Checkpoint], labels: Sequence[str]) -> None:
    """Raise PlanError if a tokenizer would have to be built."""
    problems = []
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
