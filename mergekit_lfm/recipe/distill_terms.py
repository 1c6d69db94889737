"""Terms of a distillation's loss, as declarations: `loss: {kd: 0.9, task: 0.1}`. `distill` has the code."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from mergekit_lfm.errors import did_you_mean
from mergekit_lfm.recipe.loss_terms import LOSS_TERMS, check_terms
from mergekit_lfm.recipe.problems import Problem, problem_at
from mergekit_lfm.recipe.values import FOUND
from mergekit_lfm.runtime.tasks import TUNE_TASKS

Reads = Literal["scores", "features", "states", "attentions", "labels"]

KdDivergence = Literal["forward", "reverse", "js"]

SCORED = ("lm", "classification", "masked_lm", "seq2seq")
VECTORS = ("classification", "embedding")
STACKS = ("lm", "classification", "embedding", "masked_lm", "regression")
EVERY = tuple(TUNE_TASKS)
KEPT = ("l2sp",)  # terms of a tuning that a distillation may have, too


@dataclass(frozen=True, slots=True)
class DistillTerm:
    """A term by which a student follows a teacher, with its weight. tasks: those that it fits.

    reads: what it compares; "labels" of the data, not of a teacher. layered: whether it compares layers. together: it
    is about all examples of a batch at once. same: it needs a student as wide as the teacher. any_tokenizer: it reads
    scores of a teacher that may have another tokenizer.
    """

    name: str
    source: str
    summary: str
    tasks: tuple[str, ...]
    reads: Reads
    layered: bool = False
    together: bool = False
    same: bool = False
    any_tokenizer: bool = False


DISTILL_TERMS: Mapping[str, DistillTerm] = {
    term.name: term
    for term in (
        DistillTerm("kd", "arXiv 1503.02531", "divergence of the predictions at a temperature", SCORED, "scores"),
        DistillTerm(
            "hard", "arXiv 1503.02531", "cross-entropy of the teacher's most likely class or token", SCORED, "scores"
        ),
        DistillTerm(
            "logits",
            "arXiv 1312.6184",
            "mean squared difference of the outputs themselves",
            (*SCORED, "regression"),
            "scores",
        ),
        DistillTerm(
            "uld",
            "arXiv 2402.12030",
            "differences of the sorted probabilities, for a teacher of another tokenizer, too",
            ("lm",),
            "scores",
            any_tokenizer=True,
        ),
        DistillTerm("task", "", "the loss of the task itself, on the labels of the data", EVERY, "labels"),
        DistillTerm(
            "hint",
            "arXiv 1412.6550",
            "mean squared difference of hidden states, through a trained map where widths differ",
            STACKS,
            "states",
            layered=True,
        ),
        DistillTerm(
            "vid",
            "arXiv 1904.05835",
            "bound on the information that hidden states share, with a trained variance for each unit",
            STACKS,
            "states",
            layered=True,
        ),
        DistillTerm(
            "attention",
            "arXiv 2002.10957",
            "KL divergence of the attention of each head and token",
            STACKS,
            "attentions",
            layered=True,
        ),
        DistillTerm(
            "lit",
            "arXiv 1810.01937",
            "each block of the student, fed with the teacher's states, gives the teacher's next ones",
            STACKS,
            "states",
            layered=True,
            same=True,
        ),
        DistillTerm(
            "embed",
            "arXiv 2004.09813",
            "squared distance of the vectors, of length 1, through a trained map where widths differ",
            VECTORS,
            "features",
        ),
        DistillTerm(
            "distance",
            "arXiv 1904.05068",
            "distances between the vectors of a batch, relative to their mean",
            VECTORS,
            "features",
            together=True,
        ),
        DistillTerm(
            "angle", "arXiv 1904.05068", "angles between the vectors of a batch", VECTORS, "features", together=True
        ),
        DistillTerm(
            "triplet",
            "arXiv 2205.01915",
            "which of two others an example is nearer to, for a teacher of other classes, too",
            VECTORS,
            "features",
            together=True,
        ),
        DistillTerm(
            "local",
            "arXiv 2205.01915",
            "divergence from classes by the teacher's vectors and their means for each label of the batch",
            ("classification",),
            "features",
            together=True,
        ),
    )
}
DEFAULTS: Mapping[str, Mapping[str, float]] = {
    **{task: {"kd": 1.0} for task in SCORED},
    "embedding": {"embed": 1.0},
    "regression": {"logits": 1.0},
}


def check_distill_terms(terms: Mapping[str, float], task: str, makes: str) -> Iterator[Problem]:
    """The problems of the terms of a distillation for a task, by a method that makes such a result."""
    yield from check_terms({name: terms[name] for name in terms if name in KEPT}, task, makes)
    names = (*DISTILL_TERMS, *KEPT)
    for name, number in terms.items():
        if name in KEPT:
            continue
        term = DISTILL_TERMS.get(name)
        if term is None:
            cure = did_you_mean(name, names)
            if name in LOSS_TERMS:
                cure = f"{name} is of `job: tune` alone"
            sentence = FOUND + "; {cure}"
            yield problem_at("loss", sentence, found=repr(name), expected=", ".join(names), cure=cure)
            continue
        if not 0 < number < math.inf:
            yield problem_at(f"loss.{name}", FOUND, found=str(number), expected="a number above 0")
        if task in TUNE_TASKS and task not in term.tasks:
            yield problem_at(f"loss.{name}", FOUND, found=f"the task {task}", expected=" or ".join(term.tasks))
    if terms and not any(DISTILL_TERMS[name].reads != "labels" for name in terms if name in DISTILL_TERMS):
        expected = f"a term that follows the teacher: {', '.join(n for n in DISTILL_TERMS if n != 'task')}"
        yield problem_at("loss", FOUND, found=", ".join(terms), expected=expected)
