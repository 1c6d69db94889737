"""The scores of facts: against a plain loop over texts, and on models with known probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers_editing import MODELS, tiny_model, trained_tokenizer
from torch import Tensor, nn

from mergekit_lfm.artifacts.facts import as_facts
from mergekit_lfm.artifacts.statement import Statement
from mergekit_lfm.edit.scores import METRICS, FactScores, answer_prompts, score_facts
from mergekit_lfm.errors import PlanError

FACTS = {
    "facts": [
        {
            "prompt": "{} was born in the city of",
            "subject": "Ada Blake",
            "target_new": "New York",
            "target_true": "Rome",
            "paraphrase_prompts": ["Yesterday it rained . Ada Blake was born in", "Ada Blake is of"],
            "neighborhood_prompts": ["Leo Wagner was born in the city of", "Mia Stone is of", "Zoë Müller is of"],
            "same_subject": [{"prompt": "Ada Blake works as a", "target": "glass blower"}],
        },
        {"prompt": "The language of {} is", "subject": "Mia Stone", "target_new": "Danish"},
        {"prompt": "{} speaks", "subject": "Zoë Müller", "target_new": "Danish", "target_true": "a glass blower"},
    ],
    "unedited": [{"prompt": "Leo Wagner speaks", "target": "Danish"}, {"prompt": "Leo Wagner is", "target": "a baker"}],
}


def plainly(model: nn.Module, tokenizer: Any, prompt: str, target: str) -> tuple[float, bool]:
    """Mean log-probability of the target's tokens, and True if all are the most likely: a text, a token at a time."""
    before, after = tokenizer(prompt)["input_ids"], tokenizer(f" {target}", add_special_tokens=False)["input_ids"]
    logps, hits = [], []
    with torch.no_grad():
        for i, token in enumerate(after):
            scores = model(torch.tensor([before + after[:i]])).logits[0, -1].double()
            logps.append(float(scores[token] - scores.logsumexp(0)))
            hits.append(int(scores.argmax()) == token)
    return sum(logps) / len(logps), all(hits)


def rounding(name: str) -> float:
    """The tolerance for models in float64: transformers computes norms, positions and GPT-Neo's scores in float32."""
    return 1e-12 if name.startswith("gpt2") else 1e-4 if name == "gpt-neo" else 1e-6


def share(answers: list[bool]) -> float | None:
    return sum(answers) / len(answers) if answers else None


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "gpt2"), ("gpt-neo", "llama3"), ("qwen3-tied", "llama2")])
def test_scores_are_those_of_a_plain_loop(name: str, kind: str) -> None:
    model, tokenizer = tiny_model(name), trained_tokenizer(kind)
    found = score_facts(model, tokenizer, FACTS, batch=5)
    first, second, third = as_facts(FACTS).facts

    def logp(prompt: str, target: str) -> float:
        return plainly(model, tokenizer, prompt, target)[0]

    def right(prompt: str, target: str) -> bool:
        return plainly(model, tokenizer, prompt, target)[1]

    new, true = "New York", "Rome"
    expected = {
        "es": share([logp(f.text, f.target_new) > logp(f.text, f.target_true or "") for f in (first, third)]),
        "ps": share([logp(text, new) > logp(text, true) for text in first.paraphrase_prompts]),
        "ns": share([logp(text, true) > logp(text, new) for text in first.neighborhood_prompts]),
        "ea": share([right(f.text, f.target_new) for f in (first, second, third)]),
        "pa": share([right(text, new) for text in first.paraphrase_prompts]),
        "na": share([right(text, true) for text in first.neighborhood_prompts]),
        "sa": share([right("Ada Blake works as a", "glass blower")]),
        "unedited": share([right("Leo Wagner speaks", "Danish"), right("Leo Wagner is", "a baker")]),
    }
    assert {metric: getattr(found, metric) for metric in expected} == expected
    counts = {"es": 2, "ps": 2, "ns": 3, "ea": 3, "pa": 2, "na": 3, "ga": 3, "qa": 3, "sa": 1, "unedited": 2}
    assert dict(found.counts) == counts
    for row, fact in zip(found.rows, (first, second, third), strict=True):
        assert row.p_new == pytest.approx(math.exp(logp(fact.text, fact.target_new)), rel=rounding(name))
        assert (row.subject, row.prompt, row.target_new) == (fact.subject, fact.prompt, fact.target_new)
    assert found.rows[1].p_true is None
    assert found.rows[2].p_true == pytest.approx(math.exp(logp(third.text, "a glass blower")), rel=rounding(name))


PAIRS = [("Ada Blake is", "baker"), ("It is said that the job of Leo Wagner is that of a", "glass blower")]
PAIRS += [("Mia Stone speaks", target) for target in ("Danish", "New York", "a")]
ASKED = [Statement(*pair) for pair in PAIRS]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_padding_makes_no_difference(name: str) -> None:
    model, tokenizer = tiny_model(name), trained_tokenizer("llama3")
    together, near = answer_prompts(model, tokenizer, ASKED, batch=len(ASKED)), rounding(name)
    for asked, said in zip(ASKED, together, strict=True):
        (alone,) = answer_prompts(model, tokenizer, [asked], batch=1)
        logp, right = plainly(model, tokenizer, asked.prompt, asked.target)
        assert said.logp == pytest.approx(alone.logp, abs=near) == pytest.approx(logp, abs=near)
        assert said.right == alone.right == right


class Table(nn.Module):
    """A model that follows a table: the scores of the next token depend on the present one alone, [v, v]."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.config = type("Config", (), {"get_text_config": lambda self: self})()

    def forward(self, input_ids: Tensor, use_cache: bool, attention_mask: Tensor | None = None) -> Tensor:
        assert use_cache == (attention_mask is None)
        if attention_mask is not None:
            assert attention_mask.shape == input_ids.shape
            assert bool((attention_mask.diff(dim=1) <= 0).all())  # padded on the right
        return self.scores[input_ids]


WORDS = ["[UNK]", "Ada", "is", "in", "New", "York", "Rome", ".", "cook"]


def word_tokenizer() -> Any:
    """A token for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")  # type: ignore[no-untyped-call]


def table_of(chances: dict[tuple[str, str], float]) -> Table:
    """The model with these chances of one word after another; all other words share the rest equally."""
    p = torch.zeros(len(WORDS), len(WORDS), dtype=torch.float64)
    for (now, after), chance in chances.items():
        p[WORDS.index(now), WORDS.index(after)] = chance
    rest = (1 - p.sum(1, keepdim=True)) / (p == 0).sum(1, keepdim=True)
    return Table(torch.where(p == 0, rest, p).log() + 3.0)  # scores are logits: a constant changes nothing


FACT: dict[str, Any] = {"prompt": "{} is in", "subject": "Ada", "target_new": "New York", "target_true": "Rome"}


def scored(chances: dict[tuple[str, str], float], **more: Any) -> FactScores:
    return score_facts(table_of(chances), word_tokenizer(), [FACT | more])


def test_probabilities_of_a_known_model() -> None:
    found = scored({("in", "New"): 0.5, ("New", "York"): 0.08, ("in", "Rome"): 0.3, ("New", "Rome"): 0.5})
    (row,) = found.rows
    assert row.p_new == pytest.approx((0.5 * 0.08) ** 0.5) == pytest.approx(0.2)  # the mean over tokens, not their sum
    assert row.p_true == pytest.approx(0.3)
    assert (found.es, found.ea, row.right) == (0, 0, False)  # its first token alone would be the most likely


def test_a_target_of_two_tokens_is_compared_by_its_mean_and_is_right_where_both_are() -> None:
    found = scored({("in", "New"): 0.4, ("New", "York"): 0.9, ("in", "Rome"): 0.3})
    assert (found.es, found.ea) == (1, 1)
    found = scored({("in", "New"): 0.4, ("New", "York"): 0.45, ("New", "Rome"): 0.5, ("in", "Rome"): 0.3})
    assert (found.es, found.ea) == (1, 0)
    found = scored({("in", "New"): 0.3, ("New", "York"): 0.9, ("in", "Rome"): 0.4})
    assert (found.es, found.ea) == (1, 0)  # 0.52 in the mean beats 0.4, but the model would say Rome


def test_neighbours_are_right_with_the_old_answer() -> None:
    chances = {("in", "Rome"): 0.6, ("in", "New"): 0.2, ("is", "New"): 0.5, ("New", "York"): 0.9}
    found = scored(chances, neighborhood_prompts=["Ada in", "Ada is"], paraphrase_prompts=["Ada is"])
    assert (found.es, found.ns, found.na, found.ps, found.pa) == (0, 0.5, 0.5, 1, 1)


def test_an_equally_likely_target_is_not_more_likely() -> None:
    found = score_facts(table_of({}), word_tokenizer(), [FACT | {"target_new": "cook"}])
    assert (found.es, found.ea) == (0, 0)
    assert score_facts(table_of({}), word_tokenizer(), [FACT | {"target_new": "Rome", "target_true": "cook"}]).es == 0


def test_a_model_that_says_nothing_is_wrong() -> None:
    broken = Table(torch.full((len(WORDS), len(WORDS)), math.nan))
    found = score_facts(broken, word_tokenizer(), [FACT | {"target_new": "[UNK]"}])
    assert (found.es, found.ea) == (0, 0)
    assert math.isnan(found.rows[0].p_new)


def test_without_questions_there_is_no_share() -> None:
    found = score_facts(table_of({}), word_tokenizer(), [{"prompt": "{} is", "subject": "Ada", "target_new": "cook"}])
    always = ("ea", "ga", "qa")
    assert [metric for metric in METRICS if getattr(found, metric) is not None] == [*always]
    data = found.as_data()
    assert data["counts"] == {metric: int(metric in always) for metric in METRICS}
    assert data["rows"][0] == {
        "subject": "Ada",
        "prompt": "{} is",
        "target_new": "cook",
        "right": found.rows[0].right,
        "p_new": found.rows[0].p_new,
        "p_true": None,
        "bare": found.rows[0].bare,
        "asked": found.rows[0].asked,
    }


def test_neighbours_without_an_old_answer_are_not_judged() -> None:
    fact = {"prompt": "{} is", "subject": "Ada", "target_new": "cook", "neighborhood_prompts": ["Rome is"]}
    assert score_facts(table_of({}), word_tokenizer(), [fact]).na is None


def test_each_text_runs_once_and_the_model_is_left_as_it_was() -> None:
    model = tiny_model("gpt2").train()
    told: list[tuple[int, int]] = []
    rows: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    facts = {"facts": [FACT, FACT | {"prompt": "So {} is in"}], "unedited": [{"prompt": "Ada is in", "target": "Rome"}]}
    score_facts(model, trained_tokenizer(), facts, batch=3, progress=lambda *done: told.append(done))
    hook.remove()
    assert (rows[:2], told[:2], told[-1]) == ([3, 1], [(3, 8), (4, 8)], (8, 8))  # then the model's own words
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_texts_that_the_model_cannot_take() -> None:
    with pytest.raises(PlanError, match="the model takes 48"):
        score_facts(tiny_model("gpt2"), trained_tokenizer(), [FACT | {"target_new": "Rome " * 60 + "."}])
    with pytest.raises(PlanError, match="no tokenizer"):
        score_facts(tiny_model("gpt2"), None, [FACT])


def test_a_target_that_no_token_comes_before() -> None:
    tokenizer = word_tokenizer()
    with pytest.raises(PlanError, match="nothing to predict it from"):
        answer_prompts(table_of({}), tokenizer, [Statement("", "Rome"), Statement("Ada", "Rome")])
