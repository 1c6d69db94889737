"""How much a classifier would learn from an example, by its predictions on changed copies of it.

An example is worth a label where the model is unsure (entropy), or where it says something else of each copy
(diversity). Copies that a change has made about something else are left out: only those count that are the surest of
the class which most copies have. Source: Zhou et al. 2017, CVPR, Fine-Tuning Convolutional Neural Networks for
Biomedical Image Analysis: Actively and Incrementally (AIFT), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import Count
from mergekit_lfm.runtime.data import group_rows, text_limit
from mergekit_lfm.runtime.load import Loaded, logits, run, tokenizer_for_texts
from mergekit_lfm.train.examples import seed_of

if TYPE_CHECKING:
    from mergekit_lfm.runtime.load import Tokenizer

CHANGES = ("delete", "mask")


def worth(logs: Tensor, *, entropy: float = 1.0, diversity: float = 1.0, majority: float = 0.5) -> float:
    """The worth of an example from ln p of its copies, [copies, classes].

    Of the copies the share `majority` counts that gives the class of the largest mean probability most; at least one,
    the first among equals. Over these: `entropy` times the sum of -sum p ln p, and `diversity` times the sum over pairs
    of sum (p - q) (ln p - ln q), the symmetric divergence.
    """
    logs = logs.double()
    dominant = int(logs.exp().mean(0).argmax())
    count = max(1, math.ceil(majority * len(logs)))
    order = logs[:, dominant].sort(descending=True, stable=True).indices
    logs = logs[order[:count]]
    p = logs.exp()
    unsure = -(p * logs).sum()
    apart = ((p[:, None] - p[None]) * (logs[:, None] - logs[None])).sum() / 2  # each pair once
    return float(entropy * unsure + diversity * apart)


def change_tokens(ids: Sequence[int], tokenizer: Tokenizer, change: str, share: float, seed: int) -> list[int]:
    """A copy of a text in which about a share of its tokens is deleted or masked; special ones stay.

    At least one other token stays as it is, so that something is left to be judged.
    """
    special = {*tokenizer.all_special_ids}
    own = [i for i, token in enumerate(ids) if token not in special]
    draws = torch.rand(len(own), generator=torch.Generator().manual_seed(seed)).tolist()
    spared = max(range(len(own)), key=draws.__getitem__, default=None)
    changed = {i for k, i in enumerate(own) if draws[k] < share and k != spared}
    if change == "delete":
        return [token for i, token in enumerate(ids) if i not in changed]
    mask = tokenizer.mask_token_id
    assert isinstance(mask, int)
    return [mask if i in changed else token for i, token in enumerate(ids)]


def predictions(
    model: Loaded,
    texts: Sequence[str],
    *,
    copies: int,
    change: str,
    share: float,
    window: int | None,
    batch_size: int,
    seed: int,
    count: Count,
) -> Tensor:
    """ln p of each class on changed copies of each text, float64 [texts, copies, classes].

    A copy depends on the text, its number and the seed alone. Raises PlanError for a tokenizer without a token to mask
    with.
    """
    tokenizer = tokenizer_for_texts(model.tokenizer)
    if change == "mask" and not isinstance(tokenizer.mask_token_id, int):
        raise PlanError("the tokenizer has no token to mask with; expected one. Choose the change delete")
    limit = text_limit(window, model.positions, tokenizer)
    encoded = tokenizer([*texts], truncation=limit is not None, max_length=limit, verbose=False)["input_ids"]
    rows = [
        change_tokens(ids, tokenizer, change, share, seed_of(seed, "copy", text, number))
        for text, ids in zip(texts, encoded, strict=True)
        for number in range(copies)
    ]
    logs = _run_all(model, rows, batch_size, lambda done: count(done // copies, len(texts)))
    return logs.view(len(texts), copies, -1)


def _run_all(model: Loaded, rows: Sequence[list[int]], batch_size: int, tell: Callable[[int], None]) -> Tensor:
    """ln p of each class for each row of tokens, [rows, classes]; rows of one length share batches."""
    device, found = next(model.model.parameters()).device, dict[int, Tensor]()
    for batch in group_rows(rows, None, batch_size):
        with torch.inference_mode():
            scores = logits(run(model.model, (), {"input_ids": batch.kwargs["input_ids"].to(device)}))
        found |= dict(zip(batch.indices, scores.double().log_softmax(-1).cpu(), strict=True))
        tell(len(found))
    return torch.stack([found[number] for number in range(len(rows))])
