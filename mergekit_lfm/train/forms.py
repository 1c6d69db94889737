"""Training data of three tasks: masked tokens, answers of a decoder, and numbers of texts.

Masked language models: `{"text": ...}` or a .txt file; which tokens are masked is chosen anew for each step. Encoders
with decoders: `{"prompt": ..., "completion": ...}`. Regression: `{"text": ..., "label": 0.37}`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_lfm.errors import FormatError, PlanError, reason
from mergekit_lfm.runtime.data import frame_of
from mergekit_lfm.runtime.lines import is_text, read_lines, read_objects, refuse
from mergekit_lfm.runtime.load import tokenizer_for_texts
from mergekit_lfm.train.examples import IGNORED, Examples, padding_of

if TYPE_CHECKING:
    from mergekit_lfm.runtime.load import Loaded, Tokenizer

SHARE = 0.15  # of a text's tokens, which are predicted
MASKED, OTHER = 0.8, 0.1  # of these are masked, or another token; the rest stay


@dataclass(frozen=True)
class Masking:
    """Makes tokens of a text the ones to predict, by a mask, by another token, or as they are.

    mask: the token for that. vocabulary: how many tokens there are. special: those that are never predicted.
    Source: Devlin et al. 2018, arXiv 1810.04805, section 3.1 and appendix A.1: 15 %, at least one.
    """

    mask: int
    vocabulary: int
    special: tuple[int, ...]

    def __call__(self, item: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The text with masks, and as labels the tokens to predict."""
        ids = item["input_ids"].clone()  # [tokens]
        free = self.places(ids)
        chosen = free[torch.randperm(len(free), generator=generator)[: max(1, round(SHARE * len(free)))]]
        labels = torch.full_like(ids, IGNORED)
        labels[chosen] = ids[chosen]
        fate = torch.rand(len(chosen), generator=generator)
        others = torch.randint(self.vocabulary, (len(chosen),), generator=generator)
        ids[chosen] = torch.where(fate < MASKED + OTHER, others, ids[chosen])
        ids[chosen[fate < MASKED]] = self.mask
        return {"input_ids": ids, "labels": labels}

    def places(self, ids: Tensor) -> Tensor:
        """Where tokens that may be predicted stand."""
        return (~torch.isin(ids, torch.tensor(self.special))).nonzero().flatten()


def _read_masked(path: Path, loaded: Loaded, limit: int | None) -> Examples:
    """Texts in pieces of at most `limit` tokens, each with its special tokens; nothing is cut off."""
    tokenizer, config = tokenizer_for_texts(loaded.tokenizer), loaded.model.config
    if tokenizer.mask_token_id is None:
        raise FormatError("the tokenizer has no mask; expected one. Set mask_token in tokenizer_config.json")
    sizes = (len(tokenizer), getattr(config, "vocab_size", len(tokenizer)))
    change = Masking(int(tokenizer.mask_token_id), min(sizes), tuple(sorted(tokenizer.all_special_ids)))
    items, empty = list[Mapping[str, Tensor]](), list[str]()
    for line in read_lines(path, whole=True):
        pieces = [torch.tensor(ids) for ids in _pieces(line.text, tokenizer, limit)]
        pieces = [ids for ids in pieces if len(change.places(ids))]
        items += [{"input_ids": ids} for ids in pieces]
        empty += [] if pieces else [f"line {line.number}: no token to predict"]
    if empty:
        refuse(path, empty, "texts of at least one token each")
    return Examples(items, {"input_ids": padding_of(tokenizer), "labels": IGNORED}, change=change)


def _pieces(text: str, tokenizer: Tokenizer, limit: int | None) -> list[list[int]]:
    """The tokens of a text in pieces, each between the special tokens of a text."""
    before, plain, after = frame_of(text, tokenizer)
    size = len(plain) if limit is None else limit - len(before) - len(after)
    return [[*before, *plain[i : i + size], *after] for i in range(0, len(plain), max(1, size))]


def _read_answers(path: Path, loaded: Loaded, limit: int | None) -> Examples:
    """Prompts for the encoder; completions, with the end token, as labels; and the decoder's inputs for them."""

    def read(entry: dict[str, Any], _: int) -> tuple[list[int], list[int]] | str:
        if not (is_text(entry.get("prompt")) and is_text(entry.get("completion"))):
            return 'no "prompt" with a "completion"'
        prompt: list[int] = tokenizer(entry["prompt"], verbose=False)["input_ids"]
        answer: list[int] = tokenizer(text_target=entry["completion"], verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None and answer[-1:] != [tokenizer.eos_token_id]:
            answer = [*answer, int(tokenizer.eos_token_id)]
        longest = max(len(prompt), len(answer))
        return f"{longest} tokens" if limit is not None and longest > limit else (prompt, answer)

    tokenizer, at_most = tokenizer_for_texts(loaded.tokenizer), f", of at most {limit} tokens" if limit else ""
    pairs = read_objects(path, read, f'{{"prompt": ..., "completion": ...}} on each line{at_most}')
    items = []
    for prompt, answer in pairs:
        labels = torch.tensor(answer)
        items.append({"input_ids": torch.tensor(prompt), "decoder_input_ids": _shift(loaded, labels), "labels": labels})
    padding = padding_of(tokenizer)
    return Examples(items, {"input_ids": padding, "decoder_input_ids": padding, "labels": IGNORED})


def _shift(loaded: Loaded, labels: Tensor) -> Tensor:
    """The inputs of the decoder for which it is to give the labels: after its start token, as the model shifts them."""
    model: Any = loaded.model
    try:
        shifted: Tensor = model.prepare_decoder_input_ids_from_labels(labels[None])[0]
    except (AttributeError, ValueError, TypeError) as error:
        raise PlanError(
            f"{type(model).__name__} makes no inputs of its decoder from labels ({reason(error)}); expected a model "
            "that does, with decoder_start_token_id in its config. Give another, or set that"
        ) from None
    return shifted


def _read_numbers(path: Path, loaded: Loaded, limit: int | None) -> Examples:
    """Texts, each with its number; too long ones are cut, as for classifiers."""

    def read(entry: dict[str, Any], _: int) -> tuple[str, float] | str:
        label = entry.get("label")
        if not is_text(entry.get("text")):
            return 'no "text", or an empty one'
        if isinstance(label, bool) or not isinstance(label, int | float) or not math.isfinite(label):
            return f'"label" is {json.dumps(label)}, not a number'
        return entry["text"], float(label)

    lines = read_objects(path, read, 'an object {"text": ..., "label": 0.37} on each line')
    tokenizer = tokenizer_for_texts(loaded.tokenizer)
    options: dict[str, Any] = {"truncation": limit is not None, "max_length": limit, "verbose": False}
    rows = tokenizer([text for text, _ in lines], **options)["input_ids"]
    items = [
        {"input_ids": torch.tensor(row), "labels": torch.tensor(label)}
        for row, (_, label) in zip(rows, lines, strict=True)
    ]
    return Examples(items, {"input_ids": padding_of(tokenizer)})


# How to read a file for a task. The last argument: the most tokens of a text.
FORMS: Mapping[str, Callable[[Path, Loaded, int | None], Examples]] = {
    "masked_lm": _read_masked,
    "seq2seq": _read_answers,
    "regression": _read_numbers,
}
