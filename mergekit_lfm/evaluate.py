"""How good a language model is on a text: rolling log-likelihood, perplexity, bits per byte.

Every token of the text is predicted exactly once. Bits per byte divide by the UTF-8 bytes of the text, not by tokens,
so that models with different tokenizers compare; perplexities compare only between models with the same tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.runtime import LanguageModel, load_language_model

if TYPE_CHECKING:
    from torch import Tensor

# The logits of a window are [window, vocabulary] in float32: 1 GB for 2,048 tokens and 128k entries. The 131,072
# positions that recent models declare would take 67 GB.
LONGEST_DEFAULT_WINDOW = 2048


@dataclass(frozen=True)
class Perplexity:
    """What one text cost a model; less is better."""

    tokens: int  # that were predicted
    bytes: int  # of the text in UTF-8
    nll: float  # sum of -ln p over all tokens, in nats
    perplexity: float  # exp(nll / tokens)
    bits_per_byte: float  # nll / ln 2 / bytes


def perplexity(
    model: str | Path | LanguageModel, text: str, *, window: int | None = None, stride: int | None = None
) -> Perplexity:
    """Rolling log-likelihood of the whole text under a causal language model (a folder, or one that is loaded).

    The tokens of the text, without special ones, follow one start token: the tokenizer's BOS, else its EOS. They are
    predicted in pieces of `stride`, each piece from the `window` tokens that end where it ends: a token is predicted
    from at least `window - stride + 1` tokens before it (all, near the beginning) and at most `window`. `window` is by
    default the longest sequence the model's config allows, but at most 2,048; `stride` is by default the window, which
    is cheapest. A smaller stride gives tokens more context: better numbers, for more work.

    Raises PlanError for an empty text and for a window or stride that the model cannot do, FormatError for a tokenizer
    without a start token.
    """
    language_model = model if isinstance(model, LanguageModel) else load_language_model(model)
    window, stride = _extent(language_model, window, stride)
    tokens = language_model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not tokens:
        raise PlanError("the text is empty: there is nothing to predict; give a text of at least one token")
    total = 0.0
    ids = [_start_token(language_model), *tokens]  # ids[i] stands before tokens[i]
    for begin, first, end in pieces(len(tokens), window, stride):
        total += _nll(language_model, ids[begin:end], tokens[first:end])
    size = len(text.encode())
    return Perplexity(len(tokens), size, total, _exp(total / len(tokens)), total / math.log(2) / size)


def pieces(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end) of each piece: tokens first..end are predicted from the ids begin..end, where ids[0] is the
    start token and ids[i + 1] is token i. The ranges first..end cover 0..count without overlap."""
    for first in range(0, count, stride):
        end = min(first + stride, count)
        yield max(0, end - window), first, end


def _extent(language_model: LanguageModel, window: int | None, stride: int | None) -> tuple[int, int]:
    positions = language_model.positions
    if window is None:
        window = min(positions or LONGEST_DEFAULT_WINDOW, LONGEST_DEFAULT_WINDOW)
    if stride is None:
        stride = window
    if window < 1 or (positions is not None and window > positions):
        limit = "at least 1" if positions is None else f"from 1 to {positions}, the positions of the model"
        raise PlanError(f"window is {window}; expected {limit}. Choose a window in that range, or leave it out")
    if not 1 <= stride <= window:
        raise PlanError(
            f"stride is {stride}; expected 1 to {window}, the window. Choose one in between, or leave it out"
        )
    return window, stride


def _start_token(language_model: LanguageModel) -> int:
    tokenizer = language_model.tokenizer
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise FormatError(
            "the tokenizer has neither a BOS nor an EOS token; one is expected, to predict the first token from. "
            "Set bos_token in tokenizer_config.json"
        )
    return int(start)


def _nll(language_model: LanguageModel, ids: list[int], targets: list[int]) -> float:
    """-ln p summed over the targets, the tokens that follow the last len(targets) of ids; in nats."""
    import torch

    device = language_model.model.device
    with torch.inference_mode():
        logits: Tensor = language_model.model(torch.tensor([ids], device=device), use_cache=False).logits[0]
        scores = logits[-len(targets) :].float().log_softmax(-1)  # [targets, vocabulary]
        chosen = scores.gather(-1, torch.tensor(targets, device=device)[:, None])
    return -float(chosen.double().sum())


def _exp(nats: float) -> float:
    """exp, with infinity where it exceeds the range of a float: a broken model is no reason to fail."""
    return math.exp(nats) if nats < 709 else math.inf
