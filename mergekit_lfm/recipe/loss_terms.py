"""Terms that a tuning may add to the loss of its task, as declarations: `loss: {l2sp: 0.01}`. `train` has the code."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mergekit_lfm.errors import did_you_mean
from mergekit_lfm.recipe.problems import Problem, problem_at
from mergekit_lfm.recipe.values import FOUND
from mergekit_lfm.runtime.tasks import HEADED, TUNE_TASKS

OWN_WEIGHTS = ("checkpoint", "patch")  # methods that make these train parameters of the model itself


@dataclass(frozen=True, slots=True)
class LossTerm:
    """A term that is added to a loss, with one number. tasks: those that it fits.

    instead: it takes the place of the task's loss. own: it is about the model's own parameters, so not for adapters.
    alone: it reads the states of one pass, so not for mixtures of prompts and templates. batch: it compares the
    examples of a batch.
    """

    name: str
    source: str
    summary: str
    tasks: tuple[str, ...]
    instead: bool = False
    own: bool = False
    alone: bool = False
    batch: bool = False


LOSS_TERMS: Mapping[str, LossTerm] = {
    term.name: term
    for term in (
        LossTerm(
            "l2sp",
            "Li et al. 2018, arXiv 1802.01483",
            "so many times half the squared distance of what is trained from its start",
            tuple(TUNE_TASKS),
            own=True,
        ),
        LossTerm(
            "r3f",
            "Aghajanyan et al. 2020, arXiv 2008.03156",
            "so many times the divergence of the outputs from those with a little noise on the embeddings",
            ("lm", "classification", "masked_lm", "seq2seq"),
        ),
        LossTerm(
            "r4f",
            "Aghajanyan et al. 2020, arXiv 2008.03156",
            "r3f, and each matrix of the head has the spectral norm 1, in the result too",
            ("classification",),
            own=True,
        ),
        LossTerm(
            "aux_lm",
            "Radford et al. 2018, GPT, equation 5",
            "so many times the loss of a language model on the same texts, for decoders with tied embeddings",
            HEADED,
            alone=True,
        ),
        LossTerm(
            "supcon",
            "Khosla et al. 2020, arXiv 2004.11362, equation 2",
            "so many times the contrast of vectors of one class with those of others in the batch",
            ("classification",),
            alone=True,
            batch=True,
        ),
        LossTerm(
            "dpo",
            "Rafailov et al. 2023, arXiv 2305.18290",
            "in place of lm's loss: chosen answers against rejected ones; the number is beta, 0.1 in the paper",
            ("lm",),
            instead=True,
        ),
    )
}


def check_terms(terms: Mapping[str, float], task: str, makes: str) -> Iterator[Problem]:
    """The problems of terms that are added to the loss of a task, for a method that makes such a result."""
    for name, number in terms.items():
        term, place = LOSS_TERMS.get(name), f"loss.{name}"
        if term is None:
            cure, expected = did_you_mean(name, LOSS_TERMS), ", ".join(LOSS_TERMS)
            yield problem_at("loss", FOUND + "; {cure}", found=repr(name), expected=expected, cure=cure)
            continue
        if not 0 < number < math.inf:
            yield problem_at(place, FOUND, found=str(number), expected="a number above 0")
        if task in TUNE_TASKS and task not in term.tasks:
            yield problem_at(place, FOUND, found=f"the task {task}", expected=" or ".join(term.tasks))
        found = f"a method that makes {'an' if makes[:1] == 'a' else 'a'} {makes}"
        if term.own and makes not in OWN_WEIGHTS:
            yield problem_at(place, FOUND, found=found, expected="one that trains the model's own parameters")
        if term.alone and makes in ("mixture", "template"):
            yield problem_at(place, FOUND, found=found, expected="one with a single pass for each text")
    for one, other in (("dpo", "r3f"), ("r3f", "r4f")):
        if one in terms and other in terms:
            yield problem_at("loss", FOUND, found=f"{one} and {other}", expected="one of them")
