"""Score a model on facts: which of two targets is more likely, and whether the model would say the right one.

Publications report the first alone, which hides damage. The tokenizer's special tokens precede a prompt, and the
target's tokens follow it as they do in running text: the same tokens that an edit aims at. Beside these scores stand
those of the model's own words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import exp
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergekit_lfm.artifacts.facts import Fact, FactsFile, as_facts
from mergekit_lfm.artifacts.statement import Statement
from mergekit_lfm.edit.freely import Words, answer_freely, says
from mergekit_lfm.edit.prompts import Encoded, encode, target_ids
from mergekit_lfm.edit.targets import frozen_eval, max_tokens
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import Count
from mergekit_lfm.runtime.load import logits, run, tokenizer_for_texts

if TYPE_CHECKING:
    from mergekit_lfm.runtime.load import Tokenizer


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """A model's answer to one fact. right: it would say target_new, token by token (EA).

    p_new, p_true: exp of the mean log-probability of the target's tokens; p_true: None without target_true. bare,
    asked: the model's own words after the prompt and when it is asked; None if the text leaves no room for any.
    """

    subject: str
    prompt: str
    target_new: str
    right: bool
    p_new: float
    p_true: float | None
    bare: str | None
    asked: str | None


@dataclass(frozen=True, slots=True)
class FactScores:
    """Shares of prompts, from 0 to 1; None if the facts file has no such prompts. counts: the prompts of each share.

    es, ps: target_new is more likely than target_true, after the prompts and after paraphrases. ns: target_true is more
    likely than target_new, after prompts about neighbours. ea, pa, na: after the same prompts, each token of the right
    target is the most likely of the vocabulary, given the right ones before it. ga, qa: the model's own words say
    target_new and not target_true, after the prompts and as answers to questions. sa: as ea for statements that stay
    true of the subjects; unedited: for statements that no fact is about.
    """

    es: float | None
    ps: float | None
    ns: float | None
    ea: float | None
    pa: float | None
    na: float | None
    ga: float | None
    qa: float | None
    sa: float | None
    unedited: float | None
    counts: Mapping[str, int]
    rows: tuple[ScoreRow, ...]

    def as_data(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        shares = {metric: getattr(self, metric) for metric in METRICS}
        return {**shares, "counts": dict(self.counts), "rows": [asdict(row) for row in self.rows]}


METRICS = ("es", "ps", "ns", "ea", "pa", "na", "ga", "qa", "sa", "unedited")


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's view of a target. logp: the mean over its tokens; right: each token is the most likely one."""

    logp: float
    right: bool


def score_facts(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    facts: Any,
    *,
    batch: int = 32,
    progress: Count | None = None,
) -> FactScores:
    """Score the model on the facts and on everything else in the facts file.

    facts: as `as_facts` takes them. batch: texts in one forward pass; it changes the result by rounding only.
    progress: called with (texts done, all texts). Raises PlanError if a text is longer than the model takes, or a
    target has no tokens. Of equally likely tokens the first counts; NaN counts as wrong. ES, PS, NS: Meng et al. 2022,
    ROME (arXiv 2202.05262), section 3.4 and appendix, but with means over prompts instead of means of facts' means.
    """
    facts_file = as_facts(facts)
    questions = _questions(facts_file)
    each = [statement for asked in questions.values() for q in asked for statement in (q.right, q.wrong)]
    asked = list(dict.fromkeys(statement for statement in each if statement is not None))
    rest = 2 * len(facts_file.facts)  # texts for the model's own words
    answers = answer_prompts(model, tokenizer, asked, batch=batch, progress=_part(progress, 0, rest))
    answer_to = dict(zip(asked, answers, strict=True))
    answers_of = {metric: [answer_to[q.right].right for q in each] for metric, each in questions.items()}
    for judged, compared in COMPARED_METRIC.items():
        answers_of[compared] = [
            answer_to[q.right].logp > answer_to[q.wrong].logp for q in questions[judged] if q.wrong is not None
        ]
    done = _part(progress, len(asked), 0)
    words = answer_freely(model, tokenizer_for_texts(tokenizer), facts_file.facts, batch=batch, progress=done)
    pairs = list(zip(facts_file.facts, words, strict=True))
    answers_of["ga"] = [says(said.bare, fact) for fact, said in pairs if said.bare is not None]
    answers_of["qa"] = [says(said.asked, fact) for fact, said in pairs if said.asked is not None]
    shares = {metric: sum(answers) / len(answers) if answers else None for metric, answers in answers_of.items()}
    counts = {metric: len(answers_of[metric]) for metric in METRICS}
    return FactScores(**shares, counts=counts, rows=tuple(_row(*pair, answer_to) for pair in pairs))


def _part(progress: Count | None, before: int, after: int) -> Count | None:
    """Progress of a part of the work: with other texts done before it and to do after it."""
    return None if progress is None else lambda done, total: progress(before + done, before + total + after)


COMPARED_METRIC = {"ea": "es", "pa": "ps", "na": "ns"}  # metrics of the same prompts


@dataclass(frozen=True, slots=True)
class _Question:
    """The right statement, and one with the same prompt that must be less likely."""

    right: Statement
    wrong: Statement | None = None


def _questions(facts_file: FactsFile) -> dict[str, list[_Question]]:
    """The questions of each metric that asks for the most likely target."""
    facts = facts_file.facts
    paraphrased = [(fact, text) for fact in facts for text in fact.paraphrase_prompts]
    neighbours = [(fact, text) for fact in facts for text in fact.neighborhood_prompts if fact.target_true is not None]
    return {
        "ea": [_Question(*_both(fact)) for fact in facts],
        "pa": [_Question(*_both(fact, text)) for fact, text in paraphrased],
        "na": [_Question(true, new) for new, true in (_both(*each) for each in neighbours) if true is not None],
        "sa": [_Question(statement) for fact in facts for statement in fact.same_subject],
        "unedited": [_Question(statement) for statement in facts_file.unedited],
    }


def _both(fact: Fact, prompt: str | None = None) -> tuple[Statement, Statement | None]:
    """The statements with target_new and target_true after the fact's prompt, or another one."""
    true = None if fact.target_true is None else fact.complete(fact.target_true, prompt)
    return fact.complete(fact.target_new, prompt), true


def _row(fact: Fact, words: Words, answer_to: Mapping[Statement, Answer]) -> ScoreRow:
    new = answer_to[fact.complete(fact.target_new)]
    true = None if fact.target_true is None else exp(answer_to[fact.complete(fact.target_true)].logp)
    return ScoreRow(fact.subject, fact.prompt, fact.target_new, new.right, exp(new.logp), true, words.bare, words.asked)


def answer_prompts(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    asked: Sequence[Statement],
    *,
    batch: int = 32,
    progress: Count | None = None,
) -> list[Answer]:
    """Judge the target of each statement after its prompt.

    Texts of similar length run together, padded on the right. The model does not change. Raises as `score_facts`.
    """
    encoded = _encode(model, tokenizer_for_texts(tokenizer), asked)
    order = encoded.lengths.argsort(descending=True, stable=True)
    answers: list[Answer | None] = [None] * len(asked)
    with frozen_eval(model), torch.no_grad():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            for row, each in zip(rows.tolist(), _judge(model, _select(encoded, rows)), strict=True):
                answers[row] = each
            if progress is not None:
                progress(min(start + batch, len(order)), len(order))
    return [each for each in answers if each is not None]


def _encode(model: nn.Module, tokenizer: Tokenizer, asked: Sequence[Statement]) -> Encoded:
    """The prompts with their targets; first and last locate the target. Raises as `score_facts`."""
    texts = [statement.parts for statement in asked]
    endings = [target_ids(tokenizer, prompt, rest) for prompt, rest in texts]
    encoded = encode(tokenizer, [prompt for prompt, _ in texts], endings=endings, limit=max_tokens(model))
    first = encoded.lengths - torch.tensor([len(ending) for ending in endings])
    if alone := [statement.target for statement, at in zip(asked, first.tolist(), strict=True) if at == 0]:
        raise PlanError(
            f"no token comes before the target {alone[0]!r:.80}, so the model has nothing to predict it from. Give a "
            "longer prompt"
        )
    return replace(encoded, first=first, last=encoded.lengths - 1)


def _select(encoded: Encoded, rows: Tensor) -> Encoded:
    """Some rows, without the columns in which all of them are padding."""
    width = int(encoded.lengths[rows].max())
    return Encoded(
        encoded.ids[rows, :width],
        encoded.mask[rows, :width],
        encoded.lengths[rows],
        encoded.first[rows],
        encoded.last[rows],
    )


def _judge(model: nn.Module, texts: Encoded) -> list[Answer]:
    """Judge the target of every row, in one forward pass."""
    device = next(model.parameters()).device
    scores = logits(run(model, kwargs={**texts.inputs(device), "use_cache": False}))  # [rows, tokens, vocabulary]
    counts = texts.last - texts.first + 1
    row = torch.repeat_interleave(torch.arange(len(counts)), counts)
    at = torch.cat([torch.arange(int(a), int(b) + 1) for a, b in zip(texts.first, texts.last, strict=True)])
    wanted = texts.ids[row, at].to(device)
    logp_all = scores[row.to(device), at.to(device) - 1]  # [targets' tokens, vocabulary]
    logp_all = logp_all.to(torch.promote_types(logp_all.dtype, torch.float32)).log_softmax(-1)
    logp = logp_all.gather(1, wanted[:, None])[:, 0].double().cpu()
    hit = ((logp_all.argmax(-1) == wanted) & ~logp_all.isnan().any(-1)).cpu()
    ends = counts.cumsum(0).tolist()
    spans = [slice(end - count, end) for end, count in zip(ends, counts.tolist(), strict=True)]
    return [Answer(float(logp[span].mean()), bool(hit[span].all())) for span in spans]
