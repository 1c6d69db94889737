"""Tokenise texts and locate the subject in them, by the tokenizer's offsets on the whole text.

Counting the tokens of the parts would be wrong: a word at the start of a text has other tokens than within it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_lfm.artifacts.facts import BLANK
from mergekit_lfm.errors import PlanError

if TYPE_CHECKING:
    from mergekit_lfm.runtime.load import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """Texts as rows, padded on the right. ids, mask: int64 [n, tokens]. lengths: tokens of each row, unpadded.

    first, last: the positions of the subject's first and last token; -1 in texts without one.
    """

    ids: Tensor
    mask: Tensor
    lengths: Tensor
    first: Tensor
    last: Tensor

    def rows(self, start: int, stop: int) -> Encoded:
        """Rows start to stop, without the columns in which all of them are padding."""
        width = int(self.lengths[start:stop].max())
        rows = slice(start, stop)
        return Encoded(
            self.ids[rows, :width], self.mask[rows, :width], self.lengths[rows], self.first[rows], self.last[rows]
        )

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """The model's keyword arguments."""
        return {"input_ids": self.ids.to(device), "attention_mask": self.mask.to(device)}


def encode(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    spans: Sequence[tuple[int, int] | None] | None = None,
    endings: Sequence[Sequence[int]] | None = None,
    *,
    limit: int | None = None,
) -> Encoded:
    """The texts with the tokenizer's special tokens before and the tokens `endings` after; and the spans' tokens.

    spans: of characters. limit: the most tokens that the model takes. Raises PlanError if a text has more, a span has
    no token, or the tokenizer gives no offsets.
    """
    rows, offsets = _tokens(tokenizer, texts)
    if endings is not None:
        rows = [[*row, *ending] for row, ending in zip(rows, endings, strict=True)]
    subjects = [(-1, -1)] * len(rows)
    if spans is not None:
        subjects = [_subject_tokens(*each) for each in zip(texts, offsets, spans, strict=True)]
    width = max(map(len, rows))
    if limit is not None and width > limit:
        longest = max(range(len(rows)), key=lambda i: len(rows[i]))
        raise PlanError(f"{texts[longest]!r:.80} has {width} tokens, the model takes {limit}. Shorten it")
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(width) < lengths[:, None]).long()
    first, last = torch.tensor(subjects, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return Encoded(ids, mask, lengths, first, last)


def tokens_of(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts that continue: the tokenizer's special tokens before them, and none after."""
    return _tokens(tokenizer, texts)[0] if texts else []


Offsets = list[tuple[int, int]]


def _tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[list[list[int]], list[Offsets]]:
    """The tokens of each text and their character spans, less special tokens at the end: the text continues."""
    if not getattr(tokenizer, "is_fast", False):
        raise PlanError(
            f"{type(tokenizer).__name__} does not map its tokens to characters, expected a fast tokenizer. Save the "
            "model with one (tokenizer.json)"
        )
    coded: Any = tokenizer(list(texts), return_offsets_mapping=True, return_special_tokens_mask=True, padding=False)
    rows, offsets = [], []
    for ids, each, special in zip(
        coded["input_ids"], coded["offset_mapping"], coded["special_tokens_mask"], strict=True
    ):
        last = len(ids)
        while last > 1 and special[last - 1]:
            last -= 1
        rows.append(list(ids[:last]))
        offsets.append([tuple(span) for span in each[:last]])
    return rows, offsets


def _subject_tokens(text: str, offsets: Sequence[tuple[int, int]], span: tuple[int, int] | None) -> tuple[int, int]:
    """The first and last token with characters of the span."""
    if span is None:
        return -1, -1
    inside = [i for i, (start, stop) in enumerate(offsets) if start < span[1] and stop > span[0] and stop > start]
    if not inside:
        raise PlanError(
            f"the tokenizer gives {text[slice(*span)]!r} in {text!r:.80} no token. Use another name of the subject"
        )
    return inside[0], inside[-1]


def fill_template(template: str, prompt: str, subject: str) -> tuple[str, tuple[int, int]]:
    """The prompt with its subject and the template's context filled in, and the subject's span of characters."""
    before, _, after = template.partition(BLANK)
    start, _, end = prompt.rstrip().partition(BLANK)  # blanks at the end belong to the target's tokens
    begin = len(before) + len(start)
    return f"{before}{start}{subject}{end}{after}", (begin, begin + len(subject))


def target_ids(tokenizer: Tokenizer, prompt: str, continuation: str) -> list[int]:
    """The tokens of the text that continues a prompt. Raises PlanError if it has none.

    They follow those of the prompt alone in the whole text. If the prompt has other tokens when it continues, they are
    the tokens with characters beyond it; if one of these reaches into the prompt, those after the start of a line.
    """
    ids = _following(tokenizer, prompt, continuation)
    ids = _following(tokenizer, "\n", continuation) if ids is None else ids
    if not ids:
        raise PlanError(f"the tokenizer gives the target {continuation!r} no token of its own. Give another target")
    return ids


def _following(tokenizer: Tokenizer, text: str, continuation: str) -> list[int] | None:
    """The tokens after those of the text; None if one has characters of both."""
    (row, alone), (offsets, _) = _tokens(tokenizer, [text + continuation, text])
    start = len(alone)
    if row[:start] != alone:
        start = next((i for i, (_, stop) in enumerate(offsets) if stop > len(text)), len(row))
        if start < len(row) and offsets[start][0] < len(text):
            return None
    return row[start:]
