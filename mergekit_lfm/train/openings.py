"""Prompts of a data file as tokens that a model goes on from, and the lines with its words, as training data have them.

`{"prompt": ...}` gets a completion, `{"messages": [...]}` the assistant's next turn; words of the assistant that are
there already, at the end, are written anew. Without a file the model begins a text at its start token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.runtime.data import text_limit
from mergekit_lfm.runtime.lines import is_text, read_objects, refuse
from mergekit_lfm.runtime.load import start_token
from mergekit_lfm.train.conversations import encode_messages, encode_prompt, why_no_messages

if TYPE_CHECKING:
    from mergekit_lfm.runtime.load import Tokenizer

ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class Opening:
    """The beginning of a text: the entries of its line that are known, and the line's number; 0 without a file."""

    entry: Mapping[str, Any]
    line: int = 0

    def complete(self, words: str) -> dict[str, Any]:
        """The line with the model's words, as `tune` reads it."""
        if "messages" in self.entry:
            return {"messages": [*self.entry["messages"], {"role": ASSISTANT, "content": words}]}
        return {**self.entry, "completion": words} if self.entry else {"text": words}


@dataclass(frozen=True, slots=True)
class Row:
    """The tokens of an opening, and how many more fit with an end behind them; None for any number.

    limit: the most tokens of the whole line, as `tune` reads it.
    """

    tokens: tuple[int, ...]
    room: int | None
    limit: int | None


def read_openings(path: Path, task: str) -> list[Opening]:
    """The prompts in a .jsonl file. Raises FormatError for a file without, with the first ten lines that are wrong."""
    forms = ("prompt", "messages") if task == "lm" else ("prompt",)

    def read(entry: dict[str, Any], line: int) -> Opening | str:
        found = [form for form in forms if form in entry]
        if len(found) != 1:
            return " and ".join(found) or f"no {' or '.join(forms)}" + (f", but {', '.join(entry)}" if entry else "")
        if found == ["prompt"]:
            fits = is_text(entry["prompt"])
            return Opening({"prompt": entry["prompt"]}, line) if fits else '"prompt" is not a text, or is empty'
        turns = entry["messages"]
        if why := why_no_messages(turns):
            return why
        turns = turns[:-1] if turns and turns[-1]["role"] == ASSISTANT else turns
        return Opening({"messages": turns}, line) if turns else "no message before the assistant's"

    expected = f"an object with {' or '.join(forms)} on each line"
    if path.suffix != ".jsonl":
        raise FormatError(
            f"{path}: found the suffix {path.suffix or '(none)'}; expected .jsonl, with {expected}. Convert it"
        )
    return read_objects(path, read, expected)


def encode_openings(
    path: Path | None,
    openings: Sequence[Opening],
    tokenizer: Tokenizer,
    task: str,
    *,
    window: int | None,
    positions: int | None,
) -> list[Row]:
    """The tokens of each opening, as `tune` has them before an answer.

    window: the most tokens of a prompt with its answer, at most the model's positions. Raises FormatError for prompts
    that leave no room for an answer, PlanError for a window beyond the model.
    """
    limit = text_limit(window, positions, tokenizer)
    rows = [_encode(opening.entry, tokenizer, task, limit) for opening in openings]
    full = [
        f"line {opening.line}: {len(row.tokens)} tokens"
        for opening, row in zip(openings, rows, strict=True)
        if (row.room is not None and row.room < 1) or (limit is not None and len(row.tokens) > limit)
    ]
    if full and path is not None:
        refuse(path, full, f"prompts that leave room for an answer within {limit} tokens")
    if full:
        raise PlanError(f"a text has at most {limit} tokens, with its start; expected at least 2. Give a longer window")
    return rows


def _encode(entry: Mapping[str, Any], tokenizer: Tokenizer, task: str, limit: int | None) -> Row:
    """The row of an opening. The room leaves a place for the end: of a completion, or of the assistant's turn."""
    if task == "seq2seq":
        ids: list[int] = tokenizer(entry["prompt"], verbose=False)["input_ids"]
        return Row(tuple(ids), None if limit is None else limit - 1, limit)
    end = 1
    if "messages" in entry:
        turns = entry["messages"]
        ids = encode_messages(tokenizer, turns, True)
        whole = encode_messages(tokenizer, [*turns, {"role": ASSISTANT, "content": "."}], False)
        end = max(1, len(whole) - len(ids))
    elif "prompt" in entry:
        ids = encode_prompt(entry["prompt"], tokenizer)
    else:
        ids, end = [start_token(tokenizer)], 0
    return Row(tuple(ids), None if limit is None else limit - len(ids) - end, limit)


def fit_words(opening: Opening, row: Row, tokens: list[int], tokenizer: Tokenizer, task: str) -> tuple[str, int]:
    """The words of an answer, and of how many of its tokens they are: all, unless `tune` would refuse the line then.

    A tokenizer may read words as more tokens than they were written in, such as characters that were cut.
    """
    count = len(tokens)
    while True:
        words = str(tokenizer.decode(tokens[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False))
        if row.limit is None or count == 0 or _size(opening.complete(words), tokenizer, task) <= row.limit:
            return words, count
        count -= 1


def _size(entry: Mapping[str, Any], tokenizer: Tokenizer, task: str) -> int:
    """The tokens of a line as `tune` reads it; of texts, which it cuts into windows, 0."""
    if "messages" in entry:
        return len(encode_messages(tokenizer, entry["messages"], False))
    if "prompt" not in entry:
        return 0
    if task == "seq2seq":
        return len(tokenizer(text_target=entry["completion"], verbose=False)["input_ids"])
    answer: list[int] = tokenizer(entry["completion"], add_special_tokens=False, verbose=False)["input_ids"]
    return len(encode_prompt(entry["prompt"], tokenizer)) + len(answer) + 1
