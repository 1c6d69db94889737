"""The keys about tokenizers and chat templates: every form is read, and every problem is named with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import save_checkpoint

from mergekit_lfm.errors import PlanError
from mergekit_lfm.recipe.chat import TEMPLATES
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.tokenizer import RowOf, TokenizerRequest, TokenRequest

BOTH = {"tokenizer_source": "base", "tokenizer": {"source": "base"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for name in "AB":
        save_checkpoint(path / name, {}, {})
    return path


def parse(folder: Path, **more: Any) -> Recipe:
    lines = [{"model": name, "parameters": {"weight": 1.0}} for name in "AB"]
    return Recipe.parse({"merge_method": "linear", "models": lines, **more}, where=folder)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"tokenizer": None, "tokenizer_source": None}, None),
        ({"tokenizer_source": "union"}, TokenizerRequest("union")),
        ({"tokenizer_source": "B"}, TokenizerRequest("B")),
        ({"tokenizer_source": "model:B"}, TokenizerRequest("B")),
        ({"tokenizer_source": "./B/"}, TokenizerRequest("B")),
        ({"tokenizer_source": {"model": {"path": "B"}}}, TokenizerRequest("B")),
        ({"tokenizer": {}}, TokenizerRequest("union")),
        ({"tokenizer": {"source": "base", "pad_to_multiple_of": 8}}, TokenizerRequest("base", {}, 8)),
        ({"tokenizer": {"tokens": {"x": {"source": "A"}}}}, TokenRequest(RowOf("A", "x"))),
        ({"tokenizer": {"tokens": {"x": {"source": "A", "force": True}}}}, TokenRequest(RowOf("A", "x"), True)),
        ({"tokenizer": {"tokens": {"x": {"source": {"kind": "zero"}}}}}, TokenRequest(())),
        ({"tokenizer": {"tokens": {"x": None}}}, TokenRequest()),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "B", "token_id": 3}}}}},
            TokenRequest(RowOf("B", 3)),
        ),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "B", "token": "y"}}}}},
            TokenRequest(RowOf("B", "y")),
        ),
    ],
)
def test_every_form_is_read_and_normalised(folder: Path, keys: dict[str, Any], expected: object) -> None:
    recipe = parse(folder, **keys)
    request = recipe.tokenizer_request
    assert (request.tokens["x"] if isinstance(expected, TokenRequest) and request else request) == expected
    again = Recipe.parse(recipe.normalised(), where=folder)
    assert again.tokenizer_request == request and again.normalised() == recipe.normalised()


def token(**source: Any) -> dict[str, Any]:
    return {"tokenizer": {"tokens": {"x": {"source": source}}}}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (BOTH, "tokenizer_source: `tokenizer` has a source, too; remove one of the two keys"),
        ({"tokenizer_source": "unoin"}, "found 'unoin', expected union, base or a model of this recipe; did you mean"),
        ({"tokenizer_source": "model:C"}, "tokenizer_source: found 'model:C'"),
        ({"tokenizer_source": 3}, "tokenizer_source: found 3"),
        ({"tokenizer": "union"}, "tokenizer: found 'union', expected a mapping such as"),
        ({"tokenizer": {"sorce": "base"}}, "tokenizer.sorce: unknown key, did you mean source?"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "tokenizer.pad_to_multiple_of: found 0"),
        ({"tokenizer": {"pad_to_multiple_of": True}}, "tokenizer.pad_to_multiple_of: found True"),
        ({"tokenizer": {"tokens": ["x"]}}, "tokenizer.tokens: found ['x'], expected a mapping"),
        ({"tokenizer": {"tokens": {1: {}}}}, "tokenizer.tokens: found 1, expected a token as text"),
        ({"tokenizer": {"tokens": {"x": "A"}}}, "tokenizer.tokens.x: found 'A', expected a mapping such as"),
        ({"tokenizer": {"tokens": {"x": {"from": "A"}}}}, "tokenizer.tokens.x.from: unknown key"),
        ({"tokenizer": {"tokens": {"x": {"force": 1}}}}, "tokenizer.tokens.x.force: found 1"),
        ({"tokenizer": {"tokens": {"x": {"force": True}}}}, "tokenizer.tokens.x.force: needs a `source`"),
        ({"tokenizer": {"tokens": {"x": {"source": "C"}}}}, "tokenizer.tokens.x.source: found 'C', expected a model"),
        (token(kind="zeros"), "tokenizer.tokens.x.source.kind: unknown kind 'zeros', did you mean zero?"),
        (token(kind="zero", model="A"), "tokenizer.tokens.x.source.model: unknown key"),
        (token(kind="model_token", model="C", token="y"), "tokenizer.tokens.x.source.model: found 'C'"),
        (token(kind="model_token", model="A"), "tokenizer.tokens.x.source: needs one of `token` and `token_id`"),
        (token(kind="model_token", model="A", token="y", token_id=1), "needs one of `token` and `token_id`"),
        (token(kind="model_token", model="A", token_id=-1), "tokenizer.tokens.x.source.token_id: found -1"),
        (token(kind="model_token", model="A", token=7), "tokenizer.tokens.x.source.token: found 7"),
        ({"chat_template": "chatmll"}, "chat_template: found 'chatmll', expected auto, a template's name, or"),
        ({"chat_template": "chatmll"}, "did you mean chatml?"),
        ({"chat_template": 3}, "chat_template: found 3"),
    ],
)
def test_every_problem_has_its_place(folder: Path, keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(PlanError) as refusal:
        parse(folder, **keys)
    assert expected in str(refusal.value)


def test_all_problems_come_at_once(folder: Path) -> None:
    keys = {"source": "C", "tokens": {"x": {"source": "D"}, "y": {"source": {"kind": "on"}}}, "pad_to_multiple_of": "8"}
    with pytest.raises(PlanError) as refusal:
        parse(folder, tokenizer=keys)
    wanted = ("tokenizer.source:", "tokens.x.source:", "tokens.y.source.kind:", "pad_to_multiple_of:")
    assert all(part in str(refusal.value) for part in wanted)


TALK = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
RENDERED = {  # as the formats' descriptions have them
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n"
    "### Instruction:\nBye\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n"
    "[|user|]Bye\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "Hello<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
}


def render(name: str, talk: list[tuple[str, str]]) -> str:
    """The text that transformers makes of messages with a template."""
    from helpers_tokenizers import make_tokenizer

    messages = [{"role": role, "content": content} for role, content in talk]
    tokenizer = make_tokenizer(template=TEMPLATES[name])
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_built_in_template_renders_its_format(name: str) -> None:
    pytest.importorskip("transformers")
    assert render(name, TALK) == RENDERED[name]


def test_templates_without_a_system_s_text() -> None:
    pytest.importorskip("transformers")
    intro = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    assert render("alpaca", TALK[1:2]) == f"{intro}\n\n### Instruction:\nHi\n\n### Response:\n"
    assert render("exaone", TALK[1:2]) == "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]"
    assert render("mistral", TALK[1:2]) == "<s>[INST] Hi [/INST]"


def test_unknown_keys_may_be_allowed_at_every_level(folder: Path) -> None:
    tokenizer = {"x": 1, "tokens": {"a.b": {"x": 1, "source": {"kind": "zero", "x": 1}}}}
    lines = [{"model": name, "parameters": {"weight": 1.0}} for name in "AB"]
    data = {"merge_method": "linear", "models": lines, "tokenizer": tokenizer}
    recipe = Recipe.parse(data, where=folder, allow_unknown=True)
    assert recipe.tokenizer_request == TokenizerRequest("union", {"a.b": TokenRequest(())})
    places = ("tokenizer.x", "tokenizer.tokens.a.b.x", "tokenizer.tokens.a.b.source.x")
    assert sorted(notice.split(" ")[0] for notice in recipe.notices) == sorted(places)
