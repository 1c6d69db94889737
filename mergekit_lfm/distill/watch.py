"""The parts that a model shows of a batch: scores, the vectors that its head reads, hidden states, attention.

Each part is rows, those of the examples one after the other, without padding: a teacher that has seen every example
alone, and a student that sees a batch, have the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.distill.course import Wanted
from mergekit_lfm.errors import PlanError
from mergekit_lfm.runtime.load import logits, run
from mergekit_lfm.train.examples import IGNORED, Batch
from mergekit_lfm.train.losses import Said, pool, widen
from mergekit_lfm.train.vectors import hearing_vectors, vectors_of

BESIDE = "distillation"  # the name in a student of the maps that are trained beside it
SCORES, FEATURES = "scores", "features"
STATE, ATTENTION = "state/{}", "attention/{}"
PLACES = "places"  # of tokens in the texts of their example
OTHER = "positive_"  # begins the names of the inputs of a text's positive


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [rows, width], numbers in float32 or wider, and how many of them each example has."""

    values: Tensor
    counts: tuple[int, ...]


Seen = Mapping[str, Part]


def watch(model: nn.Module, task: str, batch: Batch, wanted: Wanted) -> tuple[Any, dict[str, Part]]:
    """A model's output for a batch, and what is wanted of it. Raises PlanError for a model that does not show that."""
    inputs = inputs_of(batch)
    more: dict[str, Any] = {"output_hidden_states": True} if wanted.states else {}
    more |= {"output_attentions": True} if wanted.attentions else {}
    hears = wanted.features and task == "classification"
    with hearing_vectors(model, BESIDE) if hears else nullcontext(list[Tensor]()) as heard:
        output = run(model, (), {**inputs, **more})
    lengths, seen = lengths_of(batch), dict[str, Part]()
    if wanted.scores:
        seen[SCORES] = _scores(task, output, batch)
        if PLACES in batch:
            counted = _counted(task, batch)
            seen[PLACES] = Part(batch[PLACES][:, 1:][counted][:, None], seen[SCORES].counts)
    if wanted.features:
        seen[FEATURES] = _features(model, task, batch, output, heard)
    states = _listed(output, "hidden_states", wanted.states, model)
    for index in wanted.states:
        seen[STATE.format(index)] = _rows(states[index], lengths)
    attentions = _listed(output, "attentions", [layer - 1 for layer in wanted.attentions], model)
    for layer in wanted.attentions:
        seen[ATTENTION.format(layer)] = _distributions(attentions[layer - 1], lengths)
    return output, seen


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """The inputs of a model in a batch: of texts with positives, those of the texts."""
    return {name: x for name, x in batch.items() if name not in ("labels", PLACES) and not name.startswith(OTHER)}


def lengths_of(batch: Batch) -> tuple[int, ...] | None:
    """The tokens of each example; None for inputs without a mask, as images."""
    mask = batch.get("attention_mask")
    return None if mask is None else tuple(mask.sum(1).tolist())


def targets_of(task: str, batch: Batch) -> tuple[int, ...]:
    """How many terms the loss of a task has for each example."""
    if task in ("lm", "masked_lm", "seq2seq"):
        return tuple(_counted(task, batch).sum(1).tolist())
    return (1,) * len(next(iter(batch.values())))


def _counted(task: str, batch: Batch) -> Tensor:
    """Where the targets of a language model are, among its scores: [n, tokens], or for lm without the last."""
    labels = batch["labels"]
    return (labels[:, 1:] if task == "lm" else labels) != IGNORED


def _scores(task: str, output: Any, batch: Batch) -> Part:
    scores = logits(output)
    if task in ("lm", "masked_lm", "seq2seq"):
        counted = _counted(task, batch)
        scores = scores[:, :-1] if task == "lm" else scores
        return Part(widen(scores[counted]), tuple(counted.sum(1).tolist()))
    return Part(widen(scores.reshape(len(scores), -1)), (1,) * len(scores))


def _features(model: nn.Module, task: str, batch: Batch, output: Any, heard: Sequence[Tensor]) -> Part:
    """The vectors of examples: what the head of a classifier reads, or what an encoder of texts gives."""
    if task == "embedding":
        mine = pool(Said(output), inputs_of(batch))
        other = {name.removeprefix(OTHER): x for name, x in batch.items() if name.startswith(OTHER)}
        sides = [mine, *([pool(model, other)] if other else [])]
        return Part(widen(torch.stack(sides, 1).flatten(0, 1)), (len(sides),) * len(mine))
    vectors = vectors_of(heard[-1], batch)
    return Part(widen(vectors), (1,) * len(vectors))


def _listed(output: Any, name: str, wanted: Sequence[int], model: nn.Module) -> Sequence[Tensor]:
    """The tensors of each layer in an output. Raises PlanError if it has none, or too few."""
    found = getattr(output, name, None) or ()
    if wanted and (not found or max(wanted) >= len(found) or any(found[index] is None for index in wanted)):
        raise PlanError(
            f"{type(model).__name__} gives {len(found)} {name.replace('_', ' ')}, expected more than {max(wanted)}; "
            "choose other layers, or leave out the terms that compare them"
        )
    return found


def _rows(states: Tensor, lengths: tuple[int, ...] | None) -> Part:
    """Hidden states [n, tokens, d], or [n, d, height, width] of images, as rows."""
    if states.ndim == 4:
        states = states.flatten(2).transpose(1, 2)
    if lengths is None:
        return Part(widen(states.flatten(0, 1)), (states.shape[1],) * len(states))
    rows = [x[:length] for x, length in zip(states, lengths, strict=True)]
    return Part(widen(torch.cat(rows)), lengths)


def _distributions(attention: Tensor, lengths: tuple[int, ...] | None) -> Part:
    """The attention [n, heads, tokens, tokens] of each head and token as a row; 0 for tokens that are not there."""
    lengths = lengths or (attention.shape[-1],) * len(attention)
    width = max(lengths)
    rows = [x[:, :length, :width].flatten(0, 1) for x, length in zip(attention, lengths, strict=True)]
    return Part(widen(torch.cat(rows)), tuple(len(x) for x in rows))


def join_parts(parts: Sequence[Part]) -> Part:
    """The rows of several examples as one part. Those of attention are lengthened to the longest."""
    width = max(part.values.shape[-1] for part in parts)
    rows = [nn.functional.pad(part.values, (0, width - part.values.shape[-1])) for part in parts]
    return Part(torch.cat(rows), tuple(count for part in parts for count in part.counts))
