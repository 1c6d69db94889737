"""The output's tokens with their ids, and for each model the rows of its own or of other models that they get.

The tokenizer that the recipe names keeps its ids. With `union` the tokens of the other models follow, in the recipe's
order and each model's by its ids, and last those that only the recipe names. Where a model lacks a token, its row is as
in mergekit: the one that the recipe names; that of the only model that has the token; zeros if none has; the base's;
else the mean of all. A row beyond a tokenizer's tokens is padding, and a token beyond the rows does not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from mergekit_lfm.arch.ties import is_tied, tied_names
from mergekit_lfm.errors import PlanError, several, shorten
from mergekit_lfm.plan.rows import length_of, vocabulary_of
from mergekit_lfm.recipe.tokenizer import BASE, UNION, RowOf, TokenizerRequest
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tensors import FLOATS
from mergekit_lfm.store.tokens import Tokens
from mergekit_lfm.views.reindexed import Reindexed, join_runs

Rows = tuple[tuple[int, int], ...]  # (model, row) of each row that is averaged; () zeros


@dataclass(frozen=True)
class TokenTable:
    """The tokens of a merge. tokens: of each model, by ids. template: the index of the base, else of the first."""

    request: TokenizerRequest
    models: tuple[Checkpoint, ...]
    labels: tuple[str, ...]
    tokens: tuple[Tokens, ...]
    template: int

    @property
    def donor(self) -> int:
        """The model whose tokenizer the output has, changed."""
        source = self.request.source
        return self.template if source in (UNION, BASE) else self.labels.index(source)

    @cached_property
    def lengths(self) -> tuple[int | None, ...]:
        """The number of rows of each model's vocabulary."""
        return tuple(length_of(model) for model in self.models)

    @cached_property
    def own(self) -> tuple[dict[int, str], ...]:
        """The tokens of each model that have a row, by ids, in their order."""
        return tuple(
            {number: text for number, text in sorted(tokens.by_id.items()) if 0 <= number < (length or 0)}
            for tokens, length in zip(self.tokens, self.lengths, strict=True)
        )

    @cached_property
    def ids(self) -> tuple[Mapping[str, int], ...]:
        """The ids of each model's tokens; the lowest, if a token has two."""
        return tuple({text: number for number, text in reversed(own.items())} for own in self.own)

    @cached_property
    def by_id(self) -> dict[int, str]:
        """The output's tokens by their ids."""
        tokens = dict(self.own[self.donor])
        known, end = dict.fromkeys(tokens.values()), max(tokens, default=-1) + 1
        others = [own for i, own in enumerate(self.own) if i != self.donor and self.request.source == UNION]
        for text in (*(text for own in others for text in own.values()), *self.request.tokens):
            if text not in known:
                known[text] = None
                tokens[end] = text
                end += 1
        return tokens

    @property
    def new(self) -> Mapping[int, str]:
        """The output's tokens that its tokenizer's donor lacks."""
        return {number: text for number, text in self.by_id.items() if number not in self.own[self.donor]}

    @cached_property
    def count(self) -> int:
        """The number of rows up to the last token."""
        return max(self.by_id, default=-1) + 1

    @property
    def padding(self) -> int:
        """The number of rows behind them."""
        return 0 if self.request.multiple is None else -self.count % self.request.multiple

    @cached_property
    def named(self) -> Mapping[str, Rows]:
        """The rows that the recipe names, by tokens. Raises PlanError with all that are not there."""
        rows, problems = dict[str, Rows](), list[str]()
        for text, token in self.request.tokens.items():
            if token.source == ():
                rows[text] = ()
            elif isinstance(token.source, RowOf):
                model = self.labels.index(token.source.model)
                wanted, length = token.source.token, self.lengths[model] or 0
                row = self.ids[model].get(wanted) if isinstance(wanted, str) else wanted
                rows[text] = ((model, row or 0),)
                if row is None or row >= length:
                    place = f"tokenizer.tokens.{text}.source: {token.source.model} has no "
                    what = f"row {wanted}, but {length}" if isinstance(wanted, int) else f"token {wanted!r} with a row"
                    problems.append(f"{place}{what}; name a row that is there, or `kind: zero`")
        if problems:
            raise PlanError(several("rows of the vocabulary are missing", problems))
        return rows

    def rows_of(self, model: int) -> Iterator[Rows]:
        """The rows that each id gets in a model, in the order of ids."""
        forced = {text for text, token in self.request.tokens.items() if token.force}
        own, length = self.own[model], self.lengths[model] or 0
        for number in range(self.count):
            text = self.by_id.get(number)
            if text is None:  # between tokens: padding, if both have it there
                unused = number < length and number not in own
                yield ((model if unused else self.donor, number),)
            elif text in self.ids[model] and text not in forced:
                yield ((model, number if own.get(number) == text else self.ids[model][text]),)
            else:
                yield self.named[text] if text in self.named else self._borrowed(text)

    def _borrowed(self, text: str) -> Rows:
        """The rows that a model without this token gets."""
        holders = tuple((i, ids[text]) for i, ids in enumerate(self.ids) if text in ids)
        base = next((row for row in holders if row[0] == self.template), None)
        return holders if base is None else (base,)

    @property
    def empty(self) -> tuple[str, ...]:
        """The tokens without any row: no model has them, and the recipe does not ask for zeros."""
        return tuple(text for text in self.request.tokens if text not in self.named and not self._borrowed(text))

    def left_out(self, model: int) -> tuple[str, ...]:
        """The tokens of a model's tokenizer that the output lacks, each in quotes."""
        known = {text: number for number, text in self.by_id.items()}
        return tuple(repr(text) for _, text in sorted(self.tokens[model].by_id.items()) if text not in known)

    def fit(self) -> tuple[Checkpoint, ...]:
        """The models with the rows of the output's ids. Raises PlanError if a tensor is missing, or no float."""
        problems = list[str]()
        for i in (i for i in dict.fromkeys((self.template, self.donor)) if self.lengths[i] is None):
            raise PlanError(
                f"{self.labels[i]} has no embedding whose name is known, so its tokens have no rows to merge"
            )
        if not self.count:
            raise PlanError(
                f"{self.tokens[self.donor].path} has no token with a row in the embedding, so the output would have no "
                "rows; fetch or write it again, or name another model as the source"
            )
        fitted = [model if self.lengths[i] is None else self._fit(i, problems) for i, model in enumerate(self.models)]
        if problems:
            raise PlanError(several("the vocabularies cannot be merged by tokens", problems))
        return tuple(fitted)

    def _fit(self, model: int, problems: list[str]) -> Checkpoint:
        rows = list(self.rows_of(model))
        own = self.models[model]
        if not self.padding and rows == [((model, number),) for number in range(self.lengths[model] or 0)]:
            return own
        used = {donor: None for row in rows for donor, _ in row if donor != model}
        places = {donor: place for place, donor in enumerate((model, *used))}
        names = dict[str, list[str]]()
        for name in vocabulary_of(own):
            found = [_source_of(own, name, self.models[donor]) for donor in used]
            lacking = [self.labels[donor] for donor, source in zip(used, found, strict=True) if source is None]
            names[name] = [name, *(source for source in found if source is not None)]
            problems += [
                f"{label} has no {name}, which rows of {self.labels[model]} would come from" for label in lacking
            ]
            if own[name].dtype not in FLOATS:
                problems.append(f"{name} of {self.labels[model]} is {own[name].dtype}, whose rows cannot be merged")
        if problems:
            return own
        runs = join_runs([tuple((places[donor], number) for donor, number in row) for row in rows])
        return Reindexed(own, [self.models[donor] for donor in used], names, runs, self.padding)


def _source_of(model: Checkpoint, name: str, donor: Checkpoint) -> str | None:
    """The tensor of a donor with the rows for a model's tensor: of that name, or the one that it is tied to."""
    group = next((group for group in tied_names(dict.fromkeys([*model, *donor])) if name in group), (name,))
    order = group if is_tied(model.config) else (name, *group)
    return next((each for each in order if each in donor), None)


def describe(table: TokenTable) -> tuple[str, ...]:
    """Lines of the plan about the output's tokens."""
    donor = table.labels[table.donor]
    added = f", and {len(table.new):,} more" if table.new else ""
    padding = f", and {table.padding:,} rows of padding" if table.padding else ""
    lines = [f"{len(table.own[table.donor]):,} tokens of {donor}{added}{padding}: {table.count + table.padding:,} rows"]
    for i, label in enumerate(table.labels):
        if left := table.left_out(i):
            lines.append(f"left out: {len(left):,} of the tokens of {label}: {shorten(left)}")
    return tuple(lines)
