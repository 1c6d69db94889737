"""Terms that are added to losses: smoothness, language modelling, contrast, distance from the start; and preferences.

They count in training alone: a development set is judged by the loss of the task itself, of preferences by theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.errors import PlanError
from mergekit_lfm.runtime.load import Loaded, logits, looks_ahead, run
from mergekit_lfm.train.examples import IGNORED, Batch, Examples
from mergekit_lfm.train.losses import (
    LOSSES,
    SCORES,
    Loss,
    Scorer,
    Terms,
    cross_entropy,
    divergence,
    towards,
    widen,
)
from mergekit_lfm.train.vectors import hearing_vectors, vectors_of

NOISE = 1e-5  # standard deviation on embeddings, as the paper of R3F has it
OTHER = "rejected_"  # begins the names of the inputs of the answer that was not preferred
CONTRAST = 0.1  # the temperature of cosines, as in the paper's experiments
REFERENCE = "reference"  # the base's ln p of the two answers


def build_loss(task: str, terms: Mapping[str, float], start: Mapping[str, Tensor], base: Loss | None = None) -> Loss:
    """The loss of a task, or `base` in its place, with terms by their names. start: what is trained, as before."""
    loss = prefer(terms["dpo"]) if "dpo" in terms else base or LOSSES[task]
    for name in ("r3f", "r4f"):  # the head of r4f has its norm by a hook
        if name in terms:
            loss = smooth(SCORES[task], terms[name])
    if "aux_lm" in terms:
        loss = with_language(loss, terms["aux_lm"])
    if "supcon" in terms:
        loss = contrasting(loss, terms["supcon"])
    return towards(loss, start, terms["l2sp"]) if "l2sp" in terms else loss


def smooth(scorer: Scorer, weight: float, noise: float = NOISE) -> Loss:
    """Cross-entropy, and `weight` times KL(p, q) + KL(q, p) of outputs p, and q with normal noise on the embeddings.

    The divergence is a term of each target, as the cross-entropy is. Both have gradients, and dropout of their own, as
    in the authors' code. Source: Aghajanyan et al. 2020, arXiv 2008.03156, section 2, R3F.
    """

    def added(model: nn.Module, batch: Batch) -> Terms:
        scores, targets = scorer(model, batch)
        total, number = cross_entropy(scores, targets)
        if not model.training:
            return Terms(total, number)
        with _noise(model, noise):
            noisy, _ = scorer(model, batch)
        return Terms(total + weight * divergence(scores, noisy, targets), number)

    return added


@contextmanager
def _noise(model: Any, scale: float) -> Iterator[None]:
    """Normal noise on the embeddings of a model's inputs, of an encoder's where there is one."""
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    try:
        module = (model.get_encoder() if both else model).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        module = None
    if not isinstance(module, nn.Module):
        raise PlanError(f"r3f adds noise to embeddings, and {type(model).__name__} has none; leave r3f out")
    handle = module.register_forward_hook(lambda _, __, output: output + scale * torch.randn_like(output))
    try:
        yield
    finally:
        handle.remove()


def with_language(loss: Loss, weight: float) -> Loss:
    """The loss, and for each example `weight` times the mean -ln p of its tokens but the first, by tied embeddings.

    Source: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", equations 2 and 5.
    """

    def added(model: nn.Module, batch: Batch) -> Terms:
        if not model.training:
            return loss(model, batch)
        trunk, seen = trunk_of(model), list[Any]()
        handle = trunk.register_forward_hook(lambda _, __, output: seen.append(output))
        try:
            total, number = loss(model, batch)
        finally:
            handle.remove()
        count = batch["input_ids"].shape[1]  # without the virtual tokens of a prompt, which stand before
        states = seen[0].last_hidden_state[:, -count:-1]  # [n, tokens - 1, d]
        scores = widen(states @ trunk.get_input_embeddings().weight.T)
        counted = batch["attention_mask"][:, 1:]
        losses = nn.functional.cross_entropy(scores.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
        means = (losses * counted).sum(1) / counted.sum(1).clamp(min=1)  # [n]
        return Terms(total + weight * means.sum(), number)

    return added


def trunk_of(model: Any) -> Any:
    """A model of transformers without its head, perhaps inside of PEFT's."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, base.base_model_prefix)


def check_language(loaded: Loaded, examples: Examples) -> None:
    """Raise PlanError if no loss of a language model makes sense: no texts, an encoder, a head of its own."""
    if "input_ids" not in examples.pad:
        raise PlanError("aux_lm is for texts, and the data are arrays; leave it out")
    config: Any = loaded.model.config
    if not config.get_text_config().tie_word_embeddings:
        raise PlanError(
            "aux_lm reads tokens by the embeddings, and this model's are not tied to its head; leave it out"
        )
    if looks_ahead(trunk_of(loaded.model), loaded.positions, lambda output: output.last_hidden_state):
        raise PlanError(f"aux_lm is for decoders, and {type(loaded.model).__name__} sees later tokens; leave it out")


def contrasting(loss: Loss, weight: float) -> Loss:
    """The loss, and for each example `weight` times the `contrast` of what a classifier's head reads."""

    def added(model: nn.Module, batch: Batch) -> Terms:
        if not model.training:
            return loss(model, batch)
        with hearing_vectors(model) as heard:
            total, number = loss(model, batch)
        vectors = widen(vectors_of(heard[0], batch))  # of the first pass, if there are several
        return Terms(total + weight * contrast(vectors, batch["labels"]).sum(), number)

    return added


def contrast(vectors: Tensor, labels: Tensor, temperature: float = CONTRAST) -> Tensor:
    """For each example the mean -ln p of the others of its class among all others, by exp(cosine / temperature): [n].

    0 for one that is alone of its class. Source: Khosla et al. 2020, arXiv 2004.11362, equation 2.
    """
    units = nn.functional.normalize(vectors, dim=-1)
    itself = torch.eye(len(units), dtype=torch.bool, device=units.device)
    same = (labels[:, None] == labels[None]) & ~itself
    alone = ~same.any(1)
    scores = (units @ units.T / temperature).masked_fill(itself & ~alone[:, None], -torch.inf)
    shares = scores.log_softmax(1).masked_fill(~same, 0)
    return -shares.sum(1) / same.sum(1).clamp(min=1)


def prefer(beta: float) -> Loss:
    """-ln sigmoid(beta (r - s)), with r and s the rise of ln p over the base's, of the chosen and the rejected answer.

    A batch has the rejected answers as `rejected_input_ids` and `rejected_labels`, and the base's ln p as `reference`
    [n, 2], from `with_reference`. Source: Rafailov et al. 2023, arXiv 2305.18290, equation 7.
    """

    def loss(model: nn.Module, batch: Batch) -> Terms:
        rises = likelihoods(model, batch) - batch[REFERENCE]
        margins = beta * (rises[:, 0] - rises[:, 1])
        return Terms(-nn.functional.logsigmoid(margins).sum(), len(margins))

    return loss


def likelihoods(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of ln p over the tokens of the chosen answers, and over those of the rejected ones: [n, 2]."""
    sides = []
    for start in ("", OTHER):
        names = ("input_ids", "attention_mask")
        inputs = {name: batch[start + name] for name in names if start + name in batch}
        targets = batch[f"{start}labels"][:, 1:]
        scores = widen(logits(run(model, (), inputs))[:, :-1]).transpose(1, 2)  # [n, vocabulary, tokens - 1]
        sides.append(-nn.functional.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="none").sum(1))
    return torch.stack(sides, 1)


def with_reference(model: nn.Module, examples: Examples, size: int) -> Examples:
    """The examples with the model's ln p of their two answers, by which they are compared later. size: of a batch."""
    device, rows = next(model.parameters()).device, list[Tensor]()
    with torch.no_grad():
        for batch in examples.in_order(size):
            rows.extend(likelihoods(model, {name: x.to(device) for name, x in batch.items()}).cpu())
    return replace(examples, items=[{**item, REFERENCE: row} for item, row in zip(examples.items, rows, strict=True)])
