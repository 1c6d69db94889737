"""Score models on examples as they are tuned on them: answers of decoders, masked tokens, and numbers of texts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mergekit_lfm.runtime.load import logits, run
from mergekit_lfm.train.losses import LOSSES
from mergekit_lfm.train.texts import lengthen_for, read_examples

if TYPE_CHECKING:
    from mergekit_lfm.runtime.load import Loaded
    from mergekit_lfm.train.examples import Examples

ROWS = 16  # examples of a batch


@dataclass(frozen=True)
class TokenLoss:
    """How badly a model predicts the tokens of answers, or masked tokens; less is better."""

    examples: int
    tokens: int  # predicted tokens
    loss: float  # the mean of -ln p, in nats
    perplexity: float  # exp(loss); of masked tokens it compares models with the same tokenizer alone


@dataclass(frozen=True)
class Fit:
    """How near a model's numbers are to those of the data."""

    examples: int
    error: float  # the mean squared error; less is better
    correlation: float  # Pearson's; more is better, NaN where all numbers are the same


def token_loss(model: Loaded, data: str | Path, *, window: int | None = None) -> TokenLoss:
    """The loss of a "seq2seq" model, or of an "lm" of images, on the answers in a file, or of a "masked_lm" on tokens.

    Which tokens are masked depends on the places of the texts in the file alone, so that models are compared on the
    same ones. data, window: as of `read_examples`.
    """
    examples = read_examples(Path(data), model, window=window)
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for batch in examples.in_order(ROWS):
            terms = LOSSES[model.task](model.model, {name: x.to(_device(model)) for name, x in batch.items()})
            total, tokens = total + float(terms.total), tokens + terms.number
    loss = total / tokens
    return TokenLoss(len(examples), tokens, loss, math.exp(loss) if loss < 709 else math.inf)


def fit_of(model: Loaded, data: str | Path, *, window: int | None = None) -> Fit:
    """The error of a "regression" model's numbers for the texts in a file, and their correlation."""
    (examples,) = lengthen_for(model, [read_examples(Path(data), model, window=window)])
    found = _numbers(model, examples)
    wanted = torch.stack([item["labels"] for item in examples.items]).double()
    correlation = float(torch.corrcoef(torch.stack([found, wanted]))[0, 1]) if len(found) > 1 else math.nan
    return Fit(len(found), float((found - wanted).square().mean()), correlation)


def _numbers(model: Loaded, examples: Examples) -> torch.Tensor:
    """The model's number for each example, float64 [examples]."""
    parts = []
    with torch.inference_mode():
        for batch in examples.in_order(ROWS):
            inputs = {name: x.to(_device(model)) for name, x in batch.items() if name != "labels"}
            parts.append(logits(run(model.model, (), inputs)).double().cpu().reshape(-1))
    return torch.cat(parts)


def _device(model: Loaded) -> torch.device:
    return next(model.model.parameters()).device
