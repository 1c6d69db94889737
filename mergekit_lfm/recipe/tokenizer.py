"""The tokenizer that a recipe asks for: whose tokens the output has, and the rows of single ones. No tokenizer is read.

A row of the vocabulary belongs to a token by its text. A request exists only if the recipe has one of mergekit's keys
`tokenizer_source` and `tokenizer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from mergekit_lfm.errors import Refusal, did_you_mean
from mergekit_lfm.recipe.form import read_reference
from mergekit_lfm.recipe.problems import Problem, attempt, problem_at
from mergekit_lfm.recipe.values import FOUND

UNION, BASE = "union", "base"
TOKEN_KEYS = ("source", "force")
KINDS = {"model_token": ("kind", "model", "token", "token_id"), "zero": ("kind",)}  # and the keys of each
OLD_PREFIX = "model:"


@dataclass(frozen=True, slots=True)
class RowOf:
    """A row of the vocabulary of the model with this label: that of a token's text, or of an id."""

    model: str
    token: str | int


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """One token of the output: models that lack it get the row `source`.

    source: () zeros; None the row that any other token would get. force: it is the row of all models.
    """

    source: RowOf | tuple[()] | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerRequest:
    """Whose tokens the output has: `source` is union, base, or the label of a model. tokens: requests by their text.

    multiple: the number of rows is a multiple of it; None for as many rows as tokens.
    """

    source: str = UNION
    tokens: Mapping[str, TokenRequest] = field(default_factory=dict)
    multiple: int | None = None

    def as_data(self) -> dict[str, Any]:
        """The request as in a recipe."""
        tokens = {text: _token_data(token) for text, token in self.tokens.items()}
        return {
            "source": self.source,
            **({"tokens": tokens} if tokens else {}),
            **({} if self.multiple is None else {"pad_to_multiple_of": self.multiple}),
        }


def _token_data(token: TokenRequest) -> dict[str, Any]:
    data: dict[str, Any] = {"force": True} if token.force else {}
    if token.source == ():
        return {"source": {"kind": "zero"}, **data}
    if isinstance(token.source, RowOf):
        key = "token_id" if isinstance(token.source.token, int) else "token"
        source = {"kind": "model_token", "model": token.source.model, key: token.source.token}
        return {"source": source, **data}
    return data


def read_tokenizer(
    source: object, tokenizer: object, models: Mapping[str, str]
) -> tuple[TokenizerRequest | None, list[Problem]]:
    """The request in the recipe's keys `tokenizer_source` and `tokenizer`, None without either; and all problems.

    models: those of the recipe as written, by label.
    """
    if source is not None and tokenizer is not None:
        return None, [Problem("tokenizer_source", "`tokenizer` has a source, too; remove one of the two keys")]
    if source is not None:
        label, problems = _read_source(source, models, "tokenizer_source")
        return None if label is None else TokenizerRequest(label), problems
    if tokenizer is None:
        return None, []
    if not isinstance(tokenizer, Mapping):
        expected = "a mapping such as {source: union, tokens: {...}}"
        return None, [problem_at("tokenizer", FOUND, found=repr(tokenizer), expected=expected)]
    known = ("source", "tokens", "pad_to_multiple_of")
    problems = _unknown_keys(tokenizer, known, "tokenizer")
    stated = {key: value for key, value in tokenizer.items() if value is not None}
    label, wrong = _read_source(stated.get("source", UNION), models, "tokenizer.source")
    tokens, wrong_tokens = _read_tokens(stated.get("tokens", {}), models)
    multiple = tokenizer.get("pad_to_multiple_of")
    if multiple is not None and (not isinstance(multiple, int) or isinstance(multiple, bool) or multiple < 1):
        wrong.append(
            problem_at("tokenizer.pad_to_multiple_of", FOUND, found=repr(multiple), expected="a whole number above 0")
        )
    problems += [*wrong, *wrong_tokens]
    return None if problems or label is None else TokenizerRequest(label, tokens, multiple), problems


def _unknown_keys(data: Mapping[Any, Any], known: tuple[str, ...], place: str) -> list[Problem]:
    return [
        problem_at(f"{place}.{key}", "unknown key, {cure}", found=key, cure=did_you_mean(key, known))._replace(
            unknown=f"{place}.{key}"
        )
        for key in data
        if key not in known
    ]


def _read_source(value: object, models: Mapping[str, str], place: str) -> tuple[str | None, list[Problem]]:
    if value in (UNION, BASE):
        return str(value), []
    return attempt(lambda: _label_of(value, models, (UNION, BASE)), place)


def _label_of(value: object, models: Mapping[str, str], others: tuple[str, ...] = ()) -> str:
    """The label of the model that a value refers to, also in the old spelling `model:PATH`. Raises Refusal.

    others: further words that are valid there.
    """
    ref = read_reference(value)
    if isinstance(ref, str):
        plain = ref.removeprefix(OLD_PREFIX)
        for label, written in models.items():
            if {ref, plain} & {label, written} or PurePath(plain) == PurePath(written):
                return label
    expected = ", ".join([*others, "a model of this recipe"]).replace(", a model", " or a model")
    raise Refusal(FOUND + "; {cure}", found=repr(value), expected=expected, cure=did_you_mean(ref, [*others, *models]))


def _read_tokens(data: object, models: Mapping[str, str]) -> tuple[dict[str, TokenRequest], list[Problem]]:
    """The requests for single tokens, by their text."""
    place = "tokenizer.tokens"
    if not isinstance(data, Mapping):
        return {}, [problem_at(place, FOUND, found=repr(data), expected="a mapping from tokens to {source: ...}")]
    tokens, problems = dict[str, TokenRequest](), list[Problem]()
    for text, value in data.items():
        if not isinstance(text, str) or not text:
            problems.append(problem_at(place, FOUND, found=repr(text), expected="a token as text; put it in quotes"))
            continue
        token, wrong = _read_token(text, {} if value is None else value, models, f"{place}.{text}")
        problems += wrong
        if token is not None:
            tokens[text] = token
    return tokens, problems


def _read_token(
    text: str, data: object, models: Mapping[str, str], place: str
) -> tuple[TokenRequest | None, list[Problem]]:
    if not isinstance(data, Mapping):
        return None, [problem_at(place, FOUND, found=repr(data), expected="a mapping such as {source: MODEL}")]
    problems = _unknown_keys(data, TOKEN_KEYS, place)
    force = data.get("force", False)
    if not isinstance(force, bool):
        problems.append(problem_at(f"{place}.force", FOUND, found=repr(force), expected="true or false"))
    elif force and data.get("source") is None:
        problems.append(Problem(f"{place}.force", "needs a `source`, the row that all models get"))
    raw = data.get("source")
    if isinstance(raw, Mapping) and "kind" in raw:
        source, wrong = _read_kind(raw, models, f"{place}.source")
    elif raw is None:
        return (None if problems else TokenRequest()), problems
    else:
        label, wrong = attempt(lambda: _label_of(raw, models), f"{place}.source")
        source = None if label is None else RowOf(label, text)
    problems += wrong
    return (None if problems else TokenRequest(source, force)), problems


def _read_kind(
    data: Mapping[Any, Any], models: Mapping[str, str], place: str
) -> tuple[RowOf | tuple[()] | None, list[Problem]]:
    """The row in a mapping with `kind`."""
    kind = data["kind"]
    if not isinstance(kind, str) or kind not in KINDS:
        cure = did_you_mean(kind, KINDS)
        return None, [problem_at(f"{place}.kind", "unknown kind {found}, {cure}", found=repr(kind), cure=cure)]
    problems = _unknown_keys(data, KINDS[kind], place)
    if kind == "zero" or problems:
        return (), problems
    label, wrong = attempt(lambda: _label_of(data.get("model"), models), f"{place}.model")
    token, number = data.get("token"), data.get("token_id")
    if (token is None) == (number is None):
        wrong.append(Problem(place, "needs one of `token` and `token_id`"))
    elif token is not None and not isinstance(token, str):
        wrong.append(problem_at(f"{place}.token", FOUND, found=repr(token), expected="text; put it in quotes"))
    elif number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 0):
        wrong.append(problem_at(f"{place}.token_id", FOUND, found=repr(number), expected="an id, 0 or more"))
    named = number if token is None else token
    if wrong or label is None or not isinstance(named, str | int):
        return None, wrong
    return RowOf(label, named), []
