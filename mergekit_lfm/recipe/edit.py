"""Requests for an edit, the check of their options, and published constants. No torch.

No size depends on the model's scale: the clamp is relative to the state that is changed, lambda to the width of the
layer, the ridge to the mean of the statistics' diagonal. So one set of defaults serves models of any size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from mergekit_lfm.artifacts.facts import BLANK, read_facts_file
from mergekit_lfm.errors import did_you_mean
from mergekit_lfm.recipe.files import Where, read_file
from mergekit_lfm.recipe.options import Reader, defaults_of, read_options, readers_of, unknown_method
from mergekit_lfm.recipe.problems import Problem, attempt, problem_at, refuse
from mergekit_lfm.recipe.registry import EDIT_METHODS
from mergekit_lfm.recipe.values import FOUND, NamedFile


@dataclass(frozen=True, slots=True)
class EditRequest:
    """A request to edit a model: facts file, method and statistics. options: the user's, as JSON."""

    facts: NamedFile
    method: str
    options: str
    stats: NamedFile | None = None

    @property
    def user_options(self) -> dict[str, Any]:
        """The user's options."""
        options: dict[str, Any] = json.loads(self.options)
        return options

    def as_data(self) -> dict[str, Any]:
        """The request as in a recipe."""
        stats = {} if self.stats is None else {"stats": self.stats.ref}
        return {"facts": self.facts.ref, "method": self.method, **self.user_options, **stats}


KL_TEMPLATE = "{} is a"
# Texts before the prompt, so that the found state works in any context. One is the bare prompt.
CONTEXTS = ("{}", "The. {}", "Therefore. {}", "Because of this. {}", "I think so. {}", "You know. {}")

_LIKE_LLAMA = {"steps": 25, "lr": 0.5, "weight_decay": 1e-3, "clamp": 4.0}


_LIKE_GPT = {"lr": 0.5, "weight_decay": 0.5, "kl_factor": 0.0625}


def _preset(rome: dict[str, Any], memit: dict[str, Any] | None) -> Mapping[str, Mapping[str, Any]]:
    presets = {"rome": {**_LIKE_GPT, **rome}}
    return presets if memit is None else presets | {"memit": {**_LIKE_GPT, **memit}}


_LLAMA_PRESET = _preset({"layers": [5], **_LIKE_LLAMA}, {"layers": [4, 5, 6, 7, 8], **_LIKE_LLAMA, "lambda": 15000.0})
# The constants of the original code (gpt2-*, gpt-j-6b) and of EasyEdit (the others).
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "gpt2-medium": _preset({"layers": [8], "steps": 20, "clamp": 3.0}, None),
        "gpt2-large": _preset({"layers": [12], "steps": 20, "clamp": 4.0}, None),
        "gpt2-xl": _preset(
            {"layers": [17], "steps": 20, "clamp": 4.0},
            {"layers": [13, 14, 15, 16, 17], "steps": 20, "clamp": 0.75, "lambda": 20000.0},
        ),
        "gpt-j-6b": _preset(
            {"layers": [5], "steps": 20, "clamp": 4.0},
            {"layers": [3, 4, 5, 6, 7, 8], "steps": 25, "clamp": 0.75, "lambda": 15000.0},
        ),
        "llama-2-7b": _LLAMA_PRESET,
        "llama-3-8b": _preset(
            {"layers": [5], **_LIKE_LLAMA},
            {"layers": [4, 5, 6, 7, 8], "steps": 25, "lr": 0.1, "clamp": 0.75, "lambda": 15000.0},
        ),
        "llama-3.2-3b": _LLAMA_PRESET,
        "mistral-7b": _LLAMA_PRESET,
        "qwen2.5-7b": _LLAMA_PRESET,
    }
)


def edit_options(
    method: str, given: Mapping[str, Any], *, preset: str | None = None, place: str = "edits"
) -> dict[str, Any]:
    """The value of every option, JSON-able. Raises PlanError with a list of all problems.

    given: options by their names in YAML, such as `lambda`. They win over the preset's, and these over the defaults.
    place: the request's name in messages.
    """
    values, problems = read_edit_options(method, given, preset=preset, place=place)
    refuse(problems)
    return values


def read_edit_options(
    method: str, given: Mapping[str, Any], *, preset: str | None = None, place: str
) -> tuple[dict[str, Any], list[Problem]]:
    """The same, with all problems."""
    if method not in EDIT_METHODS:
        return {}, [unknown_method(method, EDIT_METHODS, place)]
    parameters = EDIT_METHODS[method].parameters
    constants, problems = _read_preset(given.get("preset", preset), method, f"{place}.preset")
    values: dict[str, Any] = defaults_of(parameters)
    values |= {"layers": None, "context_templates": list(CONTEXTS), "kl_template": KL_TEMPLATE, "covariance": None}
    values |= constants
    if given.get("lambda") is not None and given.get("lambda_ratio") is not None:
        problems.append(Problem(place, "found both lambda and lambda_ratio, expected one; remove the other"))
    if given.get("lambda_ratio") is not None and "lambda" in values:
        values["lambda"] = None  # the preset's
    own, wrong = read_options(given, {**readers_of(parameters), **_SHAPED}, method, place, noun="option")
    own.pop("preset", None)
    return values | own, problems + wrong


def read_edit_request(given: Mapping[str, Any], where: Where, place: str) -> tuple[EditRequest | None, list[Problem]]:
    """The request in a mapping {facts, method, stats, ...}; or None, and the problems of the first part with any."""
    rest = dict(given)
    facts, method, stats = rest.pop("facts", None), rest.pop("method", "memit"), rest.pop("stats", None)
    if not isinstance(facts, str) or not isinstance(method, str) or not isinstance(stats, str | None):
        expected = "{facts: FILE, method: NAME}, and `stats` as a file's name"
        return None, [problem_at(place, FOUND, found=repr(dict(given)), expected=expected)]
    file, problems = read_file(facts, where, place, "a facts file")
    if file is not None:
        _, problems = attempt(partial(read_facts_file, file.path), place)
    if not problems:
        _, problems = read_edit_options(method, rest, place=place)
    gram = None
    if not problems and stats is not None:
        gram, problems = read_file(stats, where, place, "a file made by `mergekit-lfm stats gram`")
    if file is None or problems:
        return None, problems
    return EditRequest(file, method, json.dumps(rest), gram), []


def _read_preset(preset: object, method: str, place: str) -> tuple[Mapping[str, Any], list[Problem]]:
    if preset is None:
        return {}, []
    if not isinstance(preset, str) or preset not in PRESETS:
        return {}, [
            problem_at(place, "unknown preset {found}, {cure}", found=repr(preset), cure=did_you_mean(preset, PRESETS))
        ]
    if method not in PRESETS[preset]:
        advice = "give the options, or choose another method"
        return {}, [Problem(place, f"{preset} has no constants for {method}; {advice}")]
    return PRESETS[preset][method], []


def _layers(value: Any) -> list[int] | None:
    if value is None:
        return None
    numbers = [value] if isinstance(value, int) else value
    whole = isinstance(numbers, list | tuple) and all(
        isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers
    )
    if not whole or not numbers or list(numbers) != sorted(set(numbers)):
        raise ValueError(f"found {value!r}, expected numbers of layers in ascending order, such as [3, 4, 5]")
    return list(numbers)


def _templates(value: Any) -> list[Any]:
    """A flat list of templates, or a list of lists; None gives the default."""
    if value is None:
        return list(CONTEXTS)
    lists = value if isinstance(value, list | tuple) else []
    flat = [text for entry in lists for text in (entry if isinstance(entry, list | tuple) else [entry])]
    if not flat or any(not isinstance(text, str) or text.count(BLANK) != 1 for text in flat):
        raise ValueError(f"found {value!r:.60}, expected a list of texts, each with {BLANK} once for the prompt")
    if BLANK not in flat:
        raise ValueError(f"found {value!r:.60}, expected {BLANK} itself among them, the bare prompt; add it")
    return [list(entry) if isinstance(entry, list | tuple) else entry for entry in lists]


def _template(value: Any) -> str:
    if not isinstance(value, str) or value.count(BLANK) != 1:
        raise ValueError(f"found {value!r}, expected a text with {BLANK} once, in place of the subject")
    return value


def _covariance(value: Any) -> str | None:
    if value not in (None, "identity"):
        raise ValueError(f"found {value!r:.40}, expected identity; give a statistics file as `stats`")
    return value  # type: ignore[no-any-return]


# Options that are not a single number or word. The preset is read before them.
_SHAPED: Mapping[str, Reader] = MappingProxyType(
    {
        "layers": _layers,
        "context_templates": _templates,
        "kl_template": _template,
        "covariance": _covariance,
        "preset": str,
    }
)
