"""Edits against plain runs of the papers' formulas: every delta in float64, for each architecture and option."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from helpers_editing import MODELS, Plain, random_covariance, tiny_model, trained_tokenizer
from torch import Tensor, nn

from mergekit_lfm.artifacts.patch import Patch
from mergekit_lfm.edit.solve import edit

FACTS = [
    {"prompt": "{} was born in the city of", "subject": "Ada Blake", "target_new": "Rome"},
    {"prompt": "{} speaks", "subject": "Mia Stone", "target_new": "glass blower"},
    {"prompt": "It is said that the job of {} is that of a", "subject": "Zoë Müller", "target_new": "New York baker"},
]
# The subject stands at the end, so that a random model, which moves nothing from token to token, can learn the facts.
AT_THE_END = [
    {"prompt": "The city of {}", "subject": "Ada Blake", "target_new": "Rome"},
    {"prompt": "Yesterday , {}", "subject": "Mia Stone", "target_new": "baker"},
    {"prompt": "the good {}", "subject": "Zoë Müller", "target_new": "Danish"},
]
TEMPLATES = ["{}", "Yesterday it rained . {}"]
NESTED = [["{}"], ["Yesterday it rained . {}"], ["Leo Wagner speaks . {}", "It is said . {}"]]
CLOSE = 1e-8  # relative, of deltas in float64


def plain(name: str, layers: Sequence[int], **changes: Any) -> Plain:
    """The plain editor of a tiny model, with statistics of its own for each layer."""
    _, config, _, _ = MODELS[name]
    inputs = config.get("n_inner") or config["intermediate_size"]
    covariance = {layer: random_covariance(inputs, layer) for layer in layers}
    given = {"tokenizer": trained_tokenizer(), "templates": TEMPLATES, "covariance": covariance} | changes
    return Plain(name, tiny_model(name), layers=layers, **given)


def edited(by: Plain, facts: Sequence[dict[str, str]], method: str, **changes: Any) -> Patch:
    """The package's edit of the same model. changes: options in place of those of the plain editor."""
    given: dict[str, Any] = {
        "layers": list(by.layers),
        "context_templates": by.templates,
        "covariance": by.covariance,
        "ridge": by.ridge,
        "steps": by.steps,
        "lr": by.lr,
        "weight_decay": by.weight_decay,
        "kl_factor": by.kl_factor,
        "clamp": by.clamp,
        "loss_threshold": by.loss_threshold,
        "kl_template": by.kl_template,
        "dtype": torch.float64,
    }
    given |= {"lambda_": by.lambda_} if method == "memit" else {}
    return edit(tiny_model(by.name), by.tokenizer, list(facts), method=method, **(given | changes))


def deltas_of(patch: Patch, layers: Sequence[int]) -> dict[int, Tensor]:
    return {layer: patch.delta(layer) for layer in layers}


def gap(patch: Patch, expected: Mapping[int, Tensor]) -> float:
    """The largest relative difference of a layer's delta."""
    assert len(patch.info.tensors) == len(expected)
    return max(float((patch.delta(layer) - delta).norm() / delta.norm()) for layer, delta in expected.items())


def with_change(by: Plain, patch: Patch) -> nn.Module:
    """The model with the patch added to its weights."""
    model = tiny_model(by.name)
    with torch.no_grad():
        for name in patch.info.tensors:
            model.get_parameter(name).add_(patch.change(name))
    return model


def chance(by: Plain, model: nn.Module, fact: dict[str, str], template: str = "{}") -> float:
    """The least probability of a token of the target, after the fact's prompt in a context."""
    ids, _ = by.filled(template, fact["prompt"], fact["subject"])
    target = by.target(fact)
    with torch.no_grad():
        told = model(torch.tensor([ids + target[:-1]])).logits[0, -len(target) :].softmax(-1)
    return min(float(row[token]) for row, token in zip(told, target, strict=True))


# ------------------------------------------------------------------ equal to the papers' formulas

PARITY = ("gpt2", "llama", "qwen3-tied")


@pytest.mark.parametrize("key", ["rome", "mean", "bare"])
@pytest.mark.parametrize("name", PARITY)
def test_rome_is_its_formula(name: str, key: str) -> None:
    by = plain(name, [1])
    facts = FACTS[::2] if key == "rome" else FACTS[1:2]
    assert gap(edited(by, facts, "rome", key=key), by.rome(facts, key)) < CLOSE


@cache
def memit_of(name: str) -> tuple[Plain, dict[int, Tensor]]:
    """The plain editor, and its changes of two layers for all facts."""
    by = plain(name, [1, 2], clamp=0.3)
    return by, by.memit(FACTS)


@pytest.mark.parametrize("name", PARITY)
def test_memit_is_its_formula(name: str) -> None:
    by, expected = memit_of(name)
    assert len({len(by.target(fact)) for fact in FACTS}) == 3
    assert gap(edited(by, FACTS, "memit"), expected) < CLOSE


@pytest.mark.parametrize("name", sorted(MODELS.keys() - set(PARITY)))
def test_other_architectures_are_edited_by_the_same_formulas(name: str) -> None:
    close = 1e-4 if name == "gpt-neo" else CLOSE  # transformers computes its attention in float32
    by = plain(name, [0, 2], steps=3)
    assert gap(edited(by, FACTS[:2], "memit"), by.memit(FACTS[:2])) < close
    by = plain(name, [1], steps=2)
    assert gap(edited(by, FACTS[:1], "rome"), by.rome(FACTS[:1])) < close


@pytest.mark.parametrize(
    "changes",
    [
        {"templates": NESTED},
        {"templates": ["{}"]},
        {"kl_factor": 2.0, "kl_template": "We saw {} ."},
        {"lr": 0.1, "weight_decay": 20.0, "clamp": 100.0},
        {"steps": 1},
        {"layers": [3]},
        {"layers": [0, 1, 2, 3]},
        {"lambda_": 0.01, "ridge": 0.5},
    ],
    ids=str,
)
def test_every_option_acts_as_in_the_formula(changes: dict[str, Any]) -> None:
    by = plain("gpt2", **({"layers": [0, 2], "steps": 3} | changes))
    # A change in the last layer moves the last token alone; elsewhere its gradient is the noise of rounding.
    facts = AT_THE_END[1:] if 3 in by.layers else FACTS[1:]
    expected = by.memit(facts)
    if by.steps == 1:  # no update at all: the outputs stay the same
        assert all(float(delta.norm()) < 1e-12 for delta in expected.values())
        assert all(float(edited(by, facts, "memit").delta(layer).norm()) < 1e-12 for layer in by.layers)
    else:
        assert gap(edited(by, facts, "memit"), expected) < CLOSE


@pytest.mark.parametrize("kind", ["trimmed", "llama3", "ended", "llama2", "prepended"])
def test_texts_begin_as_the_tokenizer_begins_them_and_targets_go_on(kind: str) -> None:
    by = plain("llama", [1, 2], tokenizer=trained_tokenizer(kind), steps=2)
    if kind != "trimmed":
        assert by.tokenizer("Ada")["input_ids"][0] == by.tokenizer.bos_token_id
    assert not {by.tokenizer.bos_token_id, by.tokenizer.eos_token_id} & {*by.target(FACTS[2])}
    assert gap(edited(by, FACTS, "memit"), by.memit(FACTS)) < CLOSE


# ------------------------------------------------------------------ the comparison can fail


def test_the_divergence_taken_the_other_way_round_gives_another_edit() -> None:
    forward, _ = memit_of("gpt2")
    backward = plain("gpt2", [1, 2], clamp=0.3, reverse_kl=True)
    assert gap(edited(forward, FACTS, "memit"), backward.memit(FACTS)) > 1e-3


@pytest.mark.parametrize(
    "changes",
    [{"lr": 0.4}, {"weight_decay": 0.0}, {"kl_factor": 0.0}, {"clamp": 0.4}, {"steps": 3}, {"ridge": 0.0}],
    ids=str,
)
def test_no_constant_is_without_effect(changes: dict[str, Any]) -> None:
    by, expected = memit_of("gpt2")
    assert gap(edited(by, FACTS, "memit", **changes), expected) > 1e-5


# ------------------------------------------------------------------ invariances


def test_facts_searched_together_are_those_searched_one_by_one() -> None:
    by = plain("llama", [2, 3], tokenizer=trained_tokenizer("llama2"), steps=9, lr=1.0, kl_factor=0.0)
    expected = by.memit(AT_THE_END)
    assert len(set(by.updates)) > 1, "all end their searches at the same step, which shows nothing"
    for batch in (1, 3):
        assert gap(edited(by, AT_THE_END, "memit", batch=batch), expected) < CLOSE


def test_the_order_of_facts_makes_no_difference_to_memit_and_one_to_rome() -> None:
    by, expected = memit_of("llama")
    assert gap(edited(by, FACTS[::-1], "memit"), expected) < CLOSE
    by = plain("llama", [1], steps=2)
    forward, backward = edited(by, FACTS[:2], "rome"), edited(by, FACTS[1::-1], "rome")
    assert gap(backward, deltas_of(forward, [1])) > 1e-3


def test_the_scale_of_the_statistics_matters_to_memit_as_lambda_does_and_not_to_rome() -> None:
    by = plain("gpt2", [1], steps=2)
    louder = {1: 8 * by.covariance[1]}
    expected = deltas_of(edited(by, FACTS, "memit"), [1])
    assert gap(edited(by, FACTS, "memit", covariance=louder, lambda_=by.lambda_ / 8), expected) < CLOSE
    assert gap(edited(by, FACTS, "memit", covariance=louder), expected) > 1e-3
    expected = deltas_of(edited(by, FACTS[:1], "rome"), [1])
    assert gap(edited(by, FACTS[:1], "rome", covariance=louder), expected) < CLOSE


SAME: list[Callable[[Plain], dict[str, Any]]] = [
    lambda by: {"lambda_": None, "lambda_ratio": by.lambda_ / 48},
    lambda by: {"covariance": {f"transformer.h.{layer}.mlp.c_proj.weight": x for layer, x in by.covariance.items()}},
    lambda by: {"covariance": {layer: by.regularised(layer) for layer in by.layers}, "ridge": 0.0},
    lambda by: {"covariance": {layer: x + x.triu(1) - x.tril(-1) for layer, x in by.covariance.items()}},
    lambda _: {"context_templates": [["{}"], TEMPLATES[1:]]},
    lambda _: {"context_templates": [*TEMPLATES[1:], "{}"]},
    lambda _: {"context_templates": [TEMPLATES[1:], ["{}"]]},
]


def test_other_ways_to_say_the_same() -> None:
    by = plain("gpt2", [1, 2], steps=2)
    expected = deltas_of(edited(by, FACTS[:2], "memit"), by.layers)
    for i, changes in enumerate(SAME):
        assert gap(edited(by, FACTS[:2], "memit", **changes(by)), expected) < CLOSE, i
    ones = {layer: torch.eye(48, dtype=torch.float64) for layer in by.layers}
    identity, plainly = (edited(by, FACTS[:2], "memit", covariance=x) for x in ("identity", ones))
    assert gap(identity, deltas_of(plainly, by.layers)) < CLOSE


# ------------------------------------------------------------------ effects of an edit


@pytest.mark.parametrize(
    ("name", "kind", "method", "facts"),
    [
        ("gpt2-square", "gpt2", "memit", AT_THE_END[1:]),
        ("llama", "llama2", "memit", AT_THE_END),
        ("llama", "llama2", "rome", AT_THE_END[:1]),
        ("qwen3-tied", "llama2", "memit", AT_THE_END[:2]),
        ("qwen3-tied", "llama2", "rome", AT_THE_END[:1]),
    ],
)
def test_the_model_says_the_new_facts(name: str, kind: str, method: str, facts: list[dict[str, str]]) -> None:
    options = {"steps": 25, "lr": 1.0, "clamp": 30.0, "kl_factor": 0.0, "weight_decay": 0.1, "lambda_": 1e-6}
    by = plain(name, [3], tokenizer=trained_tokenizer(kind), templates=["{}"], **options)
    before, after = tiny_model(name), with_change(by, edited(by, facts, method))
    for fact in facts:
        assert chance(by, before, fact) < 0.1
        assert chance(by, after, fact) > 0.9


def test_rome_gives_exactly_the_target_value_for_the_bare_prompt() -> None:
    by = plain("gpt2-square", [1], steps=5)
    patch = edited(by, FACTS[2:], "rome")
    v0, delta = by.value(FACTS[2], by.blocks[1].mlp)
    by.weight(1).add_(patch.delta(1))
    found = by.bare(FACTS[2], by.blocks[1].mlp)
    torch.testing.assert_close(found, v0 + delta, rtol=1e-10, atol=1e-10)


def test_a_square_weight_of_a_conv1d_is_changed_the_way_it_is_stored() -> None:
    by = plain("gpt2-square", [1], steps=4)
    patch = edited(by, FACTS[:1], "rome")
    (name,) = patch.info.tensors
    assert patch.info.tensors[name].axis == 0
    assert gap(patch, by.rome(FACTS[:1])) < CLOSE
    assert torch.equal(patch.change(name), patch.delta(1).T)
    assert not torch.allclose(patch.change(name), patch.delta(1))


@pytest.mark.parametrize(("method", "rank"), [("rome", 2), ("memit", 2)])
def test_a_patch_holds_a_column_for_each_fact_in_the_orientation_of_the_file(method: str, rank: int) -> None:
    for name, shape in (("gpt2", (48, 32)), ("llama", (32, 48))):
        by = plain(name, [2], steps=2)
        patch = edited(by, FACTS[:2], method)
        (weight,) = patch.info.tensors
        assert patch.info.tensors[weight].shape == shape
        assert tuple(patch.tensors[f"{weight}.left"].shape) == (shape[0], rank)
        assert tuple(patch.tensors[f"{weight}.right"].shape) == (rank, shape[1])
