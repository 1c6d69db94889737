"""The model's own words about facts: what it says after a prompt, and when it is asked, until it stops by itself.

The other scores give the model all tokens of the target but one, and stop where the target does. Yang et al. 2025,
arXiv 2502.11177, found 97 % of facts right in that way where 39 % were in the model's own words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from mergekit_lfm.artifacts.facts import Fact
from mergekit_lfm.artifacts.statement import is_spaceless
from mergekit_lfm.edit.prompts import tokens_of
from mergekit_lfm.edit.targets import frozen_eval, max_tokens
from mergekit_lfm.machine.progress import Count
from mergekit_lfm.runtime.generate import chat_tokens, generate

if TYPE_CHECKING:
    from mergekit_lfm.runtime.load import Tokenizer

MOST = 32  # tokens of an answer, if the model does not stop before
CLOZE = "What comes next? {} ..."  # a prompt as a question
QUESTION = "Question: {}\nAnswer:"  # for a model without a chat template


@dataclass(frozen=True, slots=True)
class Words:
    """The model's words after a fact's prompt (`bare`) and as an answer (`asked`); None if the text fills the model."""

    bare: str | None
    asked: str | None


def answer_freely(
    model: nn.Module, tokenizer: Tokenizer, facts: Sequence[Fact], *, batch: int = 32, progress: Count | None = None
) -> list[Words]:
    """The model's words about each fact: greedy, to its end token, the end of a line, or 32 tokens.

    The question is the fact's own, or its prompt made into one, in the chat form of a model that has one. progress:
    called with (texts done, all texts).
    """
    limit = max_tokens(model)
    rows = [*tokens_of(tokenizer, [fact.text for fact in facts]), *(_question(tokenizer, fact) for fact in facts)]

    def text(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    def ended(tokens: Sequence[int]) -> bool:
        return "\n" in str(tokenizer.decode(list(tokens))).lstrip()

    with frozen_eval(model):
        answers = generate(model, rows, MOST, batch=batch, limit=limit, ended=ended, progress=progress)
    said = [
        text(tokens).partition("\n")[0].rstrip() if limit is None or len(row) < limit else None
        for row, tokens in zip(rows, answers, strict=True)
    ]
    return [Words(*pair) for pair in zip(said[: len(facts)], said[len(facts) :], strict=True)]


def _question(tokenizer: Tokenizer, fact: Fact) -> list[int]:
    """The tokens that ask for the fact."""
    is_question = unicodedata.name(fact.text[-1], "").endswith("QUESTION MARK")  # of any script
    asks = fact.question or (fact.text if is_question else CLOZE.format(fact.text))
    return chat_tokens(tokenizer, asks) or tokens_of(tokenizer, [QUESTION.format(asks)])[0]


def says(words: str, fact: Fact) -> bool:
    """True if the words have target_new in them, and not target_true: whole words, in small or large letters."""
    targets = {_plain(target) for target in (fact.target_new, fact.target_true) if target is not None}
    either = "|".join(_whole(target) for target in sorted(targets, key=len, reverse=True))  # the longer has the shorter
    return set(re.findall(either, _plain(words))) == {_plain(fact.target_new)}


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _whole(target: str) -> str:
    """The pattern of a target: bounded as a word, where its script bounds words."""
    before = r"(?<!\w)" if target[0].isalnum() and not is_spaceless(target[0]) else ""
    after = r"(?!\w)" if target[-1].isalnum() and not is_spaceless(target[-1]) else ""
    return f"{before}{re.escape(target)}{after}"
