"""Do equal shapes mean equal things? Facts that change what the numbers of models mean, compared before a merge.

Facts: entries of the configs, the token of each id, factors of adapters (whose average is not that of their product),
and tensors of no elements. A difference is refused with both values; a recipe's `allow` names those that it accepts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mergekit_lfm.arch.facts import EMPTY, FACTORS, TOKENS, stated_facts
from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tokens import find_tokens

Difference = tuple[str, str]  # the fact's name in `allow`, and both values in words

FACTOR = re.compile(r"(^|[._])(lora_([AB]|down|up|embedding_[AB])|hada_w[12]_[ab]|lokr_w[12](_[ab])?|lora_mid)\b")
SHOWN = 3  # ids whose tokens differ
LISTED = 10  # empty tensors


def refuse_disagreements(
    recipe: Recipe, models: Sequence[Checkpoint], labels: Sequence[str], template: int
) -> tuple[str, ...]:
    """The differences between the models that the recipe allows. Raises PlanError about all others."""
    if len(models) < 2:
        return ()
    copied = all(method.name == "passthrough" for method in recipe.methods)
    found = [*_compare_configs(models, labels, template)]
    if not copied and recipe.tokenizer_request is None:
        found += _compare_tokens(models, labels, template)
    found += [] if copied else [*_find_factors(models, labels), *_find_empty(models, labels)]
    refused = [(fact, text) for fact, text in found if fact not in recipe.allow]
    if refused:
        facts = ", ".join(dict.fromkeys(fact for fact, _ in refused))
        differ = any(fact == TOKENS for fact, _ in refused)
        by_tokens = "To merge rows by their tokens, add `tokenizer_source: union`, or `base`. " if differ else ""
        raise PlanError(
            "{found}\n{cure}",
            found=several(
                "the models agree in shapes, but not in what their numbers mean", [text for _, text in refused]
            ),
            cure=f"{by_tokens}If they should be merged all the same, add `allow: [{facts}]` to the recipe",
        )
    return tuple(text for _, text in found)


def _compare_configs(models: Sequence[Checkpoint], labels: Sequence[str], template: int) -> Iterator[Difference]:
    facts = [stated_facts(model.config) for model in models]
    first = facts[template]
    for i, other in enumerate(facts):
        for place in (place for place in first if place in other and first[place] != other[place]):
            name = place.rpartition(".")[2]
            yield name, f"{place} is {other[place]} in {labels[i]}, {first[place]} in {labels[template]}"


def _compare_tokens(models: Sequence[Checkpoint], labels: Sequence[str], template: int) -> Iterator[Difference]:
    """The models whose tokenizers have other tokens for ids that the template's has, too."""
    first = find_tokens(models[template])
    for i, model in enumerate(models):
        if first is None or i == template or (tokens := find_tokens(model)) is None or tokens.digest == first.digest:
            continue
        shared = sorted(first.by_id.keys() & tokens.by_id.keys())
        wrong = [number for number in shared if first.by_id[number] != tokens.by_id[number]]
        if wrong:
            shown = ", ".join(f"{n}: {tokens.by_id[n]!r} and {first.by_id[n]!r}" for n in wrong[:SHOWN])
            more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            yield TOKENS, f"{labels[i]} and {labels[template]} have other tokens for the ids {shown}{more}"


def _find_factors(models: Sequence[Checkpoint], labels: Sequence[str]) -> Iterator[Difference]:
    """The models that hold factors of adapters: the average of products is not the product of averages."""
    for model, label in zip(models, labels, strict=True):
        factors = [name for name in model if FACTOR.search(name)]
        if factors:
            yield (
                FACTORS,
                f"{label} has {len(factors)} factors of an adapter, such as {factors[0]}: merging the factors does not "
                "merge what they multiply to. Name each adapter with its model, MODEL+ADAPTER, or merge adapters with "
                "`job: adapters`",
            )


def _find_empty(models: Sequence[Checkpoint], labels: Sequence[str]) -> Iterator[Difference]:
    """The weights without any number, as DeepSpeed's ZeRO-3 leaves them where they were not gathered."""
    for model, label in zip(models, labels, strict=True):
        empty = [name for name, spec in model.items() if spec.shape == (0,) and name.endswith((".weight", ".bias"))]
        if empty:
            more = f" and {len(empty) - LISTED} more" if len(empty) > LISTED else ""
            yield (
                EMPTY,
                f"{label} has empty tensors, of shape [0]: {', '.join(empty[:LISTED])}{more}. It was saved without its "
                "weights, as by DeepSpeed's ZeRO-3 unless they are gathered; save it again",
            )
