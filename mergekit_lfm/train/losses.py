"""Losses, as pure functions of a model and a batch: a sum over terms, and the number of terms.

Sum and number are apart so that a batch that is cut into parts has the loss, and the gradient, of the whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mergekit_lfm.errors import PlanError
from mergekit_lfm.runtime.load import embeddings, logits, run
from mergekit_lfm.train.examples import IGNORED, Batch

SCALE = 20.0  # of cosines, as sentence-transformers has it: a temperature of 0.05


class Terms(NamedTuple):
    """A loss: the sum of its terms, a scalar, and their number."""

    total: Tensor
    number: int


Loss = Callable[[nn.Module, Batch], Terms]
Scorer = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]  # scores [..., classes], and targets [...]


def next_token(model: nn.Module, batch: Batch) -> Terms:
    """Cross-entropy of each token of `labels` [n, tokens] but the first of a row, from the tokens before it."""
    return cross_entropy(*_next_scores(model, batch))


def each_token(model: nn.Module, batch: Batch) -> Terms:
    """Cross-entropy of `labels` [n, tokens] by the scores in the same places: of masked tokens, of an answer."""
    return cross_entropy(*_place_scores(model, batch))


def classes(model: nn.Module, batch: Batch) -> Terms:
    """Cross-entropy of `labels` [n]."""
    return cross_entropy(*_class_scores(model, batch))


def _next_scores(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    return logits(_run(model, batch))[:, :-1], batch["labels"][:, 1:]


def _place_scores(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    counted = batch["labels"] != IGNORED
    return logits(_run(model, batch))[counted], batch["labels"][counted]


def _class_scores(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    return logits(_run(model, batch)), batch["labels"]


# The scores behind the cross-entropy of a task.
SCORES: Mapping[str, Scorer] = {
    "lm": _next_scores,
    "classification": _class_scores,
    "masked_lm": _place_scores,
    "seq2seq": _place_scores,
}


def cross_entropy(scores: Tensor, targets: Tensor) -> Terms:
    """-ln p of the targets [...] by scores [..., classes]; those that are `IGNORED` have no term."""
    flat, wanted = widen(scores.flatten(0, -2)), targets.flatten()
    total = torch.nn.functional.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum")
    return Terms(total, int((wanted != IGNORED).sum()))


def widen(x: Tensor) -> Tensor:
    """The tensor in float32 if its dtype is shorter."""
    return x.float() if x.dtype.itemsize < 4 else x


def squares(model: nn.Module, batch: Batch) -> Terms:
    """Squared differences of `labels` [n] or [n, outputs] from what the model gives."""
    found, wanted = widen(logits(_run(model, batch))), batch["labels"]
    total = (found.reshape(wanted.shape) - wanted).square().sum()
    return Terms(total, wanted.numel())


def ranking(model: nn.Module, batch: Batch) -> Terms:
    """-ln of the share that a text's own positive has among all positives of the batch, by exp(20 cosine).

    Texts are `input_ids`, their positives `positive_input_ids`. Positives that equal a text's own are left out of its
    others. Source: Henderson et al. 2017, arXiv 1705.00652, section 4.4; van den Oord et al. 2018, arXiv 1807.03748.
    """
    return cross_entropy(*pair_scores(model, batch))


def pair_scores(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The scores of positives for each text, [n, n], and the number of its own, [n]; as `ranking` has them."""
    mine = {name: x for name, x in batch.items() if not name.startswith("positive_")}
    other = {name.removeprefix("positive_"): x for name, x in batch.items() if name.startswith("positive_")}
    if not other:
        raise PlanError('found texts without positives; expected {"text": ..., "positive": ...} on each line')
    texts, positives = (pool(model, side) for side in (mine, other))  # [n, d]
    scores = SCALE * texts @ positives.T
    ids = other["input_ids"]
    same = (ids[:, None] == ids[None]).all(-1) & ~torch.eye(len(ids), dtype=torch.bool, device=ids.device)
    return scores.masked_fill(same, -torch.inf), torch.arange(len(ids), device=ids.device)


def pool(model: nn.Module, batch: Batch) -> Tensor:
    """One vector of length 1 for each text: the mean over its tokens of the last hidden state, [n, d]."""
    output = _run(model, batch)
    states, mask = getattr(output, "last_hidden_state", None), batch.get("attention_mask")
    if states is None or mask is None:
        return embeddings(output)
    weights = mask.to(states.dtype)[..., None]
    means = (states * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(means, dim=-1)


def towards(loss: Loss, start: Mapping[str, Tensor], weight: float) -> Loss:
    """The loss, and in training `weight` times half the squared distance of the parameters in `start` from there.

    Source: Li, Grandvalet, Davoine 2018, arXiv 1802.01483, equation 2 (L2-SP).
    """

    def added(model: nn.Module, batch: Batch) -> Terms:
        total, number = loss(model, batch)
        if not model.training:
            return Terms(total, number)
        named = dict(model.named_parameters())
        distances = [(widen(named[name]) - x.to(named[name].device)).square().sum() for name, x in start.items()]
        return Terms(total + number * weight / 2 * torch.stack(distances).sum(), number)

    return added


def consistent(loss: Loss, scorer: Scorer, weight: float) -> Loss:
    """The loss, and in training `weight` times half the divergence between the predictions of two passes.

    For models that choose at random in a training, as mixtures of adapters or dropout do. The loss is of the first
    pass; scorer: of the same task. Source: Wang et al. 2022, arXiv 2205.12410, equations 6 and 7.
    """

    def added(model: nn.Module, batch: Batch) -> Terms:
        if not model.training:
            return loss(model, batch)
        (total, number), output = _watched(loss, model, batch)
        first, targets = scorer(Said(output), batch)
        second, _ = scorer(model, batch)
        return Terms(total + weight / 2 * divergence(first, second, targets), number)

    return added


def with_words(loss: Loss, places: int) -> Loss:
    """The loss, and in training the mean over places of -ln p of the word of a text's class.

    The model's score of a class is the sum of these ln p. Source: Han et al. 2021, arXiv 2105.11259, the authors' code.
    """

    def added(model: nn.Module, batch: Batch) -> Terms:
        if not model.training:
            return loss(model, batch)
        (total, number), output = _watched(loss, model, batch)
        own = logits(output).gather(1, batch["labels"][:, None])
        return Terms(total - own.sum() / places, number)

    return added


def _watched(loss: Loss, model: nn.Module, batch: Batch) -> tuple[Terms, Any]:
    """A loss, and the output of the model in the first of its passes."""
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        terms = loss(model, batch)
    finally:
        handle.remove()
    return terms, outputs[0]


class Said(nn.Module):
    """A model that gives an output once more, so that a loss of a model can be taken of its output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, **_: Tensor) -> Any:
        """The output, whatever goes in."""
        return self.output


def divergence(first: Tensor, second: Tensor, targets: Tensor) -> Tensor:
    """KL(p, q) + KL(q, p) of the predictions by two scores [..., classes], summed over targets [...] that count."""
    p, q = (widen(x[targets != IGNORED]).log_softmax(-1) for x in (first, second))
    return ((p.exp() - q.exp()) * (p - q)).sum()


LOSSES: Mapping[str, Loss] = {
    "lm": next_token,
    "classification": classes,
    "embedding": ranking,
    "masked_lm": each_token,
    "seq2seq": each_token,
    "regression": squares,
}


def _run(model: nn.Module, batch: Batch) -> object:
    """The model's output for a batch without its labels."""
    return run(model, (), {name: x for name, x in batch.items() if name != "labels"})
