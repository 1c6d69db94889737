"""Vocabularies of different lengths whose rows are merged by their ids: padded, cut, or with tokens added.

A recipe's `rows` says what becomes of the rows that only some models have: `crop` leaves them out, `keep` keeps those
of the base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.views.resized import Resized

VOCABULARY = re.compile(
    r"(^|\.)(embed_tokens|word_embeddings|wte|tok_embeddings|tokens_embed|token_embedding|embed_in|embed_out|shared|"
    r"lm_head|proj_out|(predictions|lm_head)\.decoder)\.(weight|bias)$|(^|\.)predictions\.bias$|final_logits_bias$"
)


@dataclass(frozen=True, slots=True)
class Rows:
    """The models with vocabularies of one length.

    kept: by the template's tensors the number of rows that are merged, if it keeps more. lengths: of the template's
    vocabulary and of the output's, if they differ. cut: (index of a model, tensor, rows) that lose rows.
    """

    models: tuple[Checkpoint, ...]
    kept: dict[str, int] = field(default_factory=dict)
    lengths: tuple[int, int] | None = None
    cut: tuple[tuple[int, str, int], ...] = ()


def fit_rows(how: Literal["crop", "keep"] | None, models: Sequence[Checkpoint], template: int) -> Rows:
    """The models with vocabularies of one length, as a recipe's `rows` wants them; as they are without one."""
    if how is None:
        return Rows(tuple(models))
    vocabularies = [vocabulary_of(model) for model in models]
    lengths = [length_of(model) for model in models]
    stated = [length for length in lengths if length is not None]
    first = lengths[template]
    if first is None or len(set(stated)) < 2:
        return Rows(tuple(models))
    shortest = min(stated)
    rows = shortest if how == "crop" else first
    fitted = [_fit(model, names, rows, models[template]) for model, names in zip(models, vocabularies, strict=True)]
    cut = [
        (i, name, length - rows)
        for i, names in enumerate(vocabularies)
        for name, length in names.items()
        if length > rows
    ]
    kept = dict.fromkeys(vocabularies[template], shortest) if rows > shortest else {}
    return Rows(tuple(fitted), kept, None if rows == first else (first, rows), tuple(cut))


def _fit(model: Checkpoint, names: Mapping[str, int], rows: int, template: Checkpoint) -> Checkpoint:
    """The model with so many rows: cut, or filled with the template's where that has the tensor."""
    wrong = [name for name, length in names.items() if length > rows or (length < rows and name in template)]
    return Resized(model, wrong, rows, template) if wrong else model


def vocabulary_of(model: Checkpoint) -> dict[str, int]:
    """The tensors with a row for each token, all of one length, and that."""
    names = {name: spec.shape[0] for name, spec in model.items() if spec.shape and VOCABULARY.search(name)}
    length = next(iter(names.values()), None)
    return {name: rows for name, rows in names.items() if rows == length}


def length_of(model: Checkpoint) -> int | None:
    """The number of rows of its vocabulary; None if it has no tensor with a row for each token."""
    return next(iter(vocabulary_of(model).values()), None)
