"""The texts of one batch: written by a loaded model, each with random numbers of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import Report
from mergekit_lfm.recipe.generate_recipe import GenerateRecipe
from mergekit_lfm.runtime.generate import continue_rows, stop_tokens
from mergekit_lfm.runtime.load import Loaded, tokenizer_for_texts
from mergekit_lfm.runtime.sampling import Sampling
from mergekit_lfm.train.examples import seed_of
from mergekit_lfm.train.openings import Opening, Row, fit_words

if TYPE_CHECKING:
    from mergekit_lfm.runtime.load import Tokenizer

Text = tuple[int, int]  # the number of a prompt, and that of a text among its own


class Pace:
    """Tells how many texts are done, and how many tokens a second are written."""

    def __init__(self, report: Report, whole: int, done: int) -> None:
        self.report, self.whole, self.done = report, whole, done
        self.tokens, self.started = 0, time.monotonic()
        report(done, whole, "")

    def tell(self, texts: int, tokens: int) -> None:
        """So many more are done."""
        self.done, self.tokens = self.done + texts, self.tokens + tokens
        pace = self.tokens / max(time.monotonic() - self.started, 1e-9)
        self.report(self.done, self.whole, f"{pace:,.0f} tokens/s")


def write_batch(
    loaded: Loaded,
    recipe: GenerateRecipe,
    openings: Sequence[Opening],
    rows: Sequence[Row],
    batch: Sequence[Text],
    pace: Pace,
) -> list[dict[str, Any]]:
    """The texts of a batch: of each its words, the number of its tokens, and whether it ended by itself."""
    tokenizer = tokenizer_for_texts(loaded.tokenizer)
    sampling = Sampling(recipe.temperature, recipe.top_k, recipe.top_p)
    streams = [torch.Generator().manual_seed(seed_of(recipe.seed, *text)) for text in batch]
    first = rows[batch[0][0]]
    said = continue_rows(
        loaded.model,
        [rows[number].tokens for number, _ in batch],
        recipe.max_new_tokens if first.room is None else min(first.room, recipe.max_new_tokens),
        stops=_ends(loaded, tokenizer),
        pick=lambda scores: sampling.pick(scores, streams),
        start=_decoder_start(loaded) if recipe.task == "seq2seq" else None,
        tell=lambda new: pace.tell(0, new),
    )
    texts = list[dict[str, Any]]()
    for (number, _), each in zip(batch, said, strict=True):
        words, count = fit_words(openings[number], rows[number], each.tokens, tokenizer, recipe.task)
        texts.append({"text": words, "tokens": count, "ended": each.ended and count == len(each.tokens)})
    return texts


def _ends(loaded: Loaded, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a text: those that the model names, and the tokenizer's, with which `tune` ends answers."""
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return stop_tokens(loaded.model).union(own)


def _decoder_start(loaded: Loaded) -> list[int]:
    """The first tokens of the decoder: its start token, and one that the generation config has after it."""
    model: Any = loaded.model
    configs = (getattr(model, "generation_config", None), model.config)
    start = next((x for each in configs if (x := getattr(each, "decoder_start_token_id", None)) is not None), None)
    if start is None:
        raise PlanError(
            f"{type(model).__name__} names no decoder_start_token_id; expected one in its config. Set it there"
        )
    forced = getattr(configs[0], "forced_bos_token_id", None)
    return [int(start), *([] if forced is None else [int(forced)])]
