"""How a student follows its teachers: terms with weights, and what is compared for them. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergekit_lfm.recipe.distill_terms import DISTILL_TERMS

Pairs = Sequence[tuple[int, int]]  # layers of the student and of the teacher that belong together


@dataclass(frozen=True, slots=True)
class Wanted:
    """The parts that a model shows. states: of hidden states, 0 for the embeddings; attentions: of layers, from 1."""

    scores: bool = False
    features: bool = False
    states: tuple[int, ...] = ()
    attentions: tuple[int, ...] = ()


@dataclass(frozen=True)
class Course:
    """How a student follows its teachers. weights: of `DISTILL_TERMS`. pairs: of layers, for each teacher.

    shares: of the teachers, whose sum is 1. classes: of the student, first and last, that each teacher has. widths: the
    length of the vocabulary that the student and each teacher share, as one may be padded; None for all.
    """

    task: str
    weights: Mapping[str, float]
    pairs: Sequence[Pairs]
    shares: Sequence[float]
    temperature: float = 2.0
    divergence: str = "forward"
    classes: Sequence[tuple[int, int]] = ()
    widths: Sequence[int | None] = ()

    def wanted(self, teacher: int | None) -> Wanted:
        """The parts that a teacher shows; None stands for the student."""
        reads = {DISTILL_TERMS[name].reads for name in self.weights}
        scores = "scores" in reads or (teacher is None and "local" in self.weights)
        if teacher is None:
            layers = sorted({mine for pairs in self.pairs for mine, _ in pairs})
        else:
            layers = sorted({theirs for _, theirs in self.pairs[teacher]})
        attended = tuple(layer for layer in layers if layer) if "attentions" in reads else ()
        states = tuple(layers) if "states" in reads else ()
        return Wanted(scores, "features" in reads, states, attended)

    @property
    def shown(self) -> Wanted:
        """The parts that the student shows in a step: without those that it is only checked by beforehand."""
        reads = {name: DISTILL_TERMS[name].reads for name in self.weights if name not in ("local", "lit")}
        whole = self.wanted(None)
        features, states = "features" in reads.values(), whole.states if "states" in reads.values() else ()
        return replace(whole, features=features, states=states)

    @property
    def by_tokens(self) -> bool:
        """Whether a term compares token with token, so that the teachers must have the student's tokenizer."""
        terms = [DISTILL_TERMS[name] for name in self.weights]
        return any(term.reads != "labels" and not term.any_tokenizer for term in terms)


def even_pairs(mine: int, theirs: int) -> Pairs:
    """The layers of a student, each with the teacher's at the same share of its depth."""
    return [(layer, round(layer * theirs / mine)) for layer in range(1, mine + 1)]


def labels_of(config: Mapping[str, Any]) -> int | None:
    """The classes that a config names; transformers' own number is 2."""
    names = config.get("id2label")
    return len(names) if isinstance(names, Mapping) else config.get("num_labels")
