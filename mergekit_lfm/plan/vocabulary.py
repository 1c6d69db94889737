"""Vocabularies that differ: merged by their tokens as the recipe's `tokenizer` wants, by ids as its `rows`, or refused.

Rows beyond the tokens are padding: models with equal tokens and other numbers of rows are fitted unasked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mergekit_lfm.errors import FormatError, PlanError, several
from mergekit_lfm.plan.rows import VOCABULARY, Rows, fit_rows, length_of, vocabulary_of
from mergekit_lfm.plan.tokens import TokenTable, describe
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.tokenizer import BASE, UNION, TokenizerRequest
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.files import read_bytes
from mergekit_lfm.store.tokens import WHOLE, Tokens, find_tokens
from mergekit_lfm.views.pending import Pending
from mergekit_lfm.views.reindexed import Reindexed
from mergekit_lfm.views.resized import Resized

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The models with one vocabulary. table: the output's tokens, None for the template's.

    notices: for the plan. warnings: for the merge, too.
    """

    rows: Rows
    table: TokenTable | None = None
    notices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def without_fit(models: Sequence[Checkpoint]) -> tuple[Checkpoint, ...]:
    """The models of a plan as they were before their vocabularies were fitted."""
    return tuple(model.inners[0] if isinstance(model, Reindexed | Resized) else model for model in models)


def fit_vocabulary(recipe: Recipe, models: Sequence[Checkpoint], labels: Sequence[str], template: int) -> Vocabulary:
    """The models with one vocabulary, as far as the recipe or equal tokens say how.

    Raises PlanError if their tokens and rows differ and the recipe does not choose, or if its choice does not fit.
    """
    request, lengths = recipe.tokenizer_request, [length_of(model) for model in models]
    ragged = len({length for length in lengths if length is not None}) > 1
    if request is not None:
        vocabulary = _fit_request(recipe, request, models, labels, template)
    elif recipe.rows is None and ragged and not _chooses(recipe, models[template]):
        vocabulary = _fit_unasked(models, labels, template)
    else:
        vocabulary = Vocabulary(fit_rows(recipe.rows, models, template))
    _refuse_changed(recipe, models, vocabulary.rows.models, labels)
    return vocabulary


def _chooses(recipe: Recipe, template: Checkpoint) -> bool:
    """True if the recipe takes the vocabulary of one model."""
    names = [name for name in template if VOCABULARY.search(name)]
    return recipe.tensors == "common" or any(part in name for part in recipe.keep for name in names)


def _fit_unasked(models: Sequence[Checkpoint], labels: Sequence[str], template: int) -> Vocabulary:
    tokens = [find_tokens(model) for model in models]
    if _is_padding(models, tokens):
        return _fit_padding(models, labels, template)
    known = [each for each in tokens if each is not None]
    if len(known) == len(models) and not _are_alike(models, tokens):
        raise _difference(models, labels, template, known)
    return Vocabulary(fit_rows(None, models, template))


def _fit_request(
    recipe: Recipe, request: TokenizerRequest, models: Sequence[Checkpoint], labels: Sequence[str], template: int
) -> Vocabulary:
    tokens = [find_tokens(model) for model in models]
    same = _is_padding(models, tokens) and not request.tokens and request.multiple is None
    of_template = request.source in (UNION, BASE, labels[template])
    if same and of_template:
        by_rows = Vocabulary(fit_rows(recipe.rows, models, template))
        return by_rows if recipe.rows is not None else _fit_padding(models, labels, template)
    if recipe.rows is not None:
        raise PlanError("`rows` merges rows by their ids, `tokenizer` by their tokens: remove one of the two keys")
    table = TokenTable(request, tuple(models), tuple(labels), _whole(tokens, labels), template)
    if same:
        return replace(_fit_padding(models, labels, template), table=table)
    before, after = table.lengths[template] or 0, table.count + table.padding
    rows = Rows(table.fit(), lengths=None if before == after else (before, after))
    warnings = [f"no model has the token {text!r}: its row is zeros" for text in table.empty]
    return Vocabulary(rows, table, describe(table), tuple(warnings))


def _is_padding(models: Sequence[Checkpoint], tokens: Sequence[Tokens | None]) -> bool:
    """True if all models have the same tokens, and all rows that only some have are beyond these."""
    stated = [length for length in map(length_of, models) if length is not None]
    if not _are_alike(models, tokens):
        return False
    if len(set(stated)) < 2:
        return True
    return tokens[0] is not None and bool(tokens[0].by_id) and max(tokens[0].by_id) < min(stated)


def _are_alike(models: Sequence[Checkpoint], tokens: Sequence[Tokens | None]) -> bool:
    """True if all models have the same tokens for the same ids."""
    known = [each for each in tokens if each is not None]
    if known:
        first = known[0]
        same = all(each.digest == first.digest or each.by_id == first.by_id for each in known)
        return same and len(known) == len(tokens)
    return len({_sentencepiece(model) for model in models}) == 1


def _sentencepiece(model: Checkpoint) -> bytes | None:
    """The model of a tokenizer that is not stated as text."""
    if model.snapshot is not None:
        model.snapshot.fetch([name for name in SENTENCEPIECE if name in model.snapshot.sizes])
    return next((read_bytes(path) for name in SENTENCEPIECE if (path := model.path / name).is_file()), None)


def _whole(tokens: Sequence[Tokens | None], labels: Sequence[str]) -> tuple[Tokens, ...]:
    """The tokens of all models. Raises PlanError about those without a tokenizer.json."""
    whole = tuple(each for each in tokens if each is not None and each.whole)
    if len(whole) < len(tokens):
        without = [label for label, each in zip(labels, tokens, strict=True) if each is None or not each.whole]
        raise PlanError(
            f"found no {WHOLE} in {', '.join(without)}, expected one in every model whose rows are merged by tokens: "
            "load the tokenizer with transformers' AutoTokenizer as a fast one, and save it into the model's folder"
        )
    for each in (each for each in whole if not isinstance(each.data, dict)):
        raise FormatError(f"{each.path} holds no mapping, expected a tokenizer; fetch or write it again")
    return whole


def _fit_padding(models: Sequence[Checkpoint], labels: Sequence[str], template: int) -> Vocabulary:
    """The models with the base's number of rows: those that only some have are padding."""
    rows, lengths = fit_rows("keep", models, template), [length_of(model) for model in models]
    others = [
        f"{length:,} rows of {label}"
        for label, length in zip(labels, lengths, strict=True)
        if length not in (None, lengths[template])
    ]
    if not others or lengths[template] is None:
        return Vocabulary(rows)
    text = f"the {', '.join(others)} are fitted to the {lengths[template]:,} of {labels[template]}"
    return Vocabulary(rows, notices=(f"{text}: all models have the same tokens, the rows beyond them are padding",))


def _difference(
    models: Sequence[Checkpoint], labels: Sequence[str], template: int, tokens: Sequence[Tokens]
) -> PlanError:
    """The error about models whose tokens and numbers of rows differ."""
    first = tokens[template]

    def describe_model(i: int) -> str:
        tensors = ", ".join(str(models[i][name]) for name in vocabulary_of(models[i]))
        return f"{labels[i]} has {len(tokens[i].by_id):,} tokens: {tensors}"

    problems = [
        f"{describe_model(i)}; {describe_model(template)}"
        for i in range(len(models))
        if length_of(models[i]) is not None and tokens[i].by_id != first.by_id
    ]
    return PlanError(
        "{found}\n{cure}",
        found=several("the models have other vocabularies", problems),
        cure=f"To merge rows by their tokens, add `tokenizer_source: union` to the recipe for the tokens of all, or "
        f"`tokenizer_source: base` for those of {labels[template]}; to merge them by their ids, `rows: crop` or "
        "`rows: keep`, with `allow: [tokens]` if one id stands for several tokens",
    )


def _refuse_changed(
    recipe: Recipe, before: Sequence[Checkpoint], after: Sequence[Checkpoint], labels: Sequence[str]
) -> None:
    """Raise PlanError if a model with other rows still has to be aligned or edited, or has statistics."""
    problems = []
    elementwise = [part for part in recipe.parts if not part.method.whole]
    described = {model.label for part in elementwise for model in part.inputs if model.stats is not None}
    changed = {label for label, old, new in zip(labels, before, after, strict=True) if old is not new}
    for model, old in zip(recipe.all_models, before, strict=True):
        if model.label in changed and isinstance(old, Pending):
            key = "align" if model.align else "edits"
            problems.append(
                f"{model.label} is still to be changed by its `{key}`: save the changed model, and merge that"
            )
        if model.label in changed and model.label in described:
            problems.append(f"the `stats` of {model.label} are about the rows that it has now: merge without them")
    if problems:
        raise PlanError(several("rows of the vocabulary would be added or removed", problems))
