"""The problems of a recipe in the words of its user, from the errors that pydantic raises about its form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from functools import reduce
from operator import getitem
from typing import Any, TypeVar

from pydantic import ValidationError

from mergekit_lfm.errors import PlanError, Refusal, did_you_mean
from mergekit_lfm.recipe.files import Where
from mergekit_lfm.recipe.form import NOT_YET, AdapterEntry, ModelEntry, ModuleEntry, Push, SliceEntry, Strict
from mergekit_lfm.recipe.problems import Problem, Problems, UnknownKey, parts_of, problem_at
from mergekit_lfm.recipe.values import FOUND
from mergekit_lfm.store.yaml import find_steps, read_yaml

SHOULD = "Input should be "  # how pydantic begins to say what it expected
EXPECTED = {  # by pydantic's kind of error
    "model_type": "a mapping such as {model: path, parameters: {weight: 0.5}}",
    "tuple_type": "a list of models",
    "dict_type": "a mapping of parameter names to values",
    "string_type": "text",
    "too_short": "text",
    "invalid_key": "a key that is text; put it in quotes",
    "string_pattern_mismatch": "cpu, cuda, cuda:1 or auto",
}

LISTS = ("models", "sources", "slices", "modules", "adapters", "include", "exclude", "save")
# The same for the other lists, by their key.
EXPECTED_AT = {
    ("model_type", "adapters"): "a mapping such as {adapter: path, parameters: {weight: 0.5}}",
    ("tuple_type", "adapters"): "a list of adapters",
    **{("tuple_type", key): "a regular expression, or a list of them" for key in ("include", "exclude", "save")},
    ("model_type", "slices"): "a mapping such as {sources: [{model: path, layer_range: [0, 16]}]}",
    ("model_type", "modules"): "a mapping such as {models: [{model: path}]}",
    ("tuple_type", "slices"): "a list of slices, each with `sources`",
    ("dict_type", "modules"): "a mapping from the names of modules to {models: ...}",
}


F = TypeVar("F", bound=Strict)


def read_document(source: Mapping[str, Any] | str, label: str, expected: str) -> Mapping[str, Any]:
    """The mapping in YAML text, or as it is. Raises PlanError for anything else, with what is expected."""
    data = read_yaml(source, label) if isinstance(source, str) else source
    if not isinstance(data, Mapping):
        raise PlanError(f"{{place}}: {FOUND}", place=label, found=f"{data!r:.40}", expected=expected)
    return data


def read_form(
    read: Callable[[Mapping[str, Any]], tuple[F | None, list[Problem]]],
    data: Mapping[str, Any],
    label: str,
    *,
    allow_unknown: bool,
) -> tuple[F, tuple[str, ...]]:
    """The form that `read` makes of data, and a notice for each unknown key, an error unless `allow_unknown`.

    Raises PlanError with all problems.
    """
    ignored = dict[str, str]()
    while True:
        form, problems = read(data)
        if form is not None:
            return form, tuple(ignored.values())
        unknown = {each.unknown: each.text for each in problems if allow_unknown and each.unknown}
        if not unknown:
            break
        ignored |= {key: f"{key} has no effect here: {text}" for key, text in unknown.items()}
        data = without_keys(data, unknown)
    count = f"{len(problems)} problems\n  " if len(problems) > 1 else ""
    parts = parts_of(problems)
    place = ": ".join([label, *([parts.pop("place")] if "place" in parts else [])])
    lines = "\n  ".join(map(str, problems))
    raise PlanError("{label}: {count}{lines}", label=label, count=count, lines=lines, place=place, **parts)


def find_problems(
    form: type[F],
    data: Mapping[str, Any],
    where: Where,
    prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda data: data,
) -> tuple[F | None, list[Problem]]:
    """The form of data, whose models are `where`; or None, and all problems."""
    try:
        return form.model_validate(prepare(data), context={"where": where, "whole": True}), []
    except ValidationError as error:
        problems = [*content_problems(error), *form_problems(error, form)]
        rest = without_faults(data, error)
    if rest != data:  # errors of form hide errors of content
        try:
            form.model_validate(rest, context={"where": where, "whole": False})
        except ValidationError as error:
            problems += content_problems(error)
    return None, problems


def content_problems(error: ValidationError) -> list[Problem]:
    """The problems of content, which the check of a recipe without problems of form has found."""
    refusals = [detail["ctx"]["error"] for detail in error.errors(include_url=False) if detail["loc"] == ()]
    return [problem for refusal in refusals for problem in _problems_of("", refusal)]


def _problems_of(place: str, error: ValueError) -> list[Problem]:
    """The lines of an error, at a place."""
    if isinstance(error, Problems):
        return list(error.problems)
    if isinstance(error, UnknownKey):
        return [Problem(place, error.text, error.parts, place + error.key)]
    parts = error.parts if isinstance(error, Refusal) else {}
    return [Problem(place, line, parts) for line in str(error).split("\n")]


def form_problems(error: ValidationError, recipe: type[Strict]) -> Iterator[Problem]:
    """The problems of form in the data of a recipe, whose form is `recipe`."""
    details = error.errors(include_url=False)
    for detail in details:
        kind, value = detail["type"], detail["input"]
        path = tuple(part for part in detail["loc"] if part != "[key]")  # pydantic's word for a wrong key itself
        key_path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
        if path == ():
            continue
        if kind == "extra_forbidden":
            form = _form_at(path, recipe)
            key = str(path[-1])
            cure = did_you_mean(key, form.model_fields)
            problem = problem_at(key_path, "unknown key, {cure}", found=key, cure=cure)
            yield Problem(key_path, NOT_YET[key]) if key in NOT_YET else problem._replace(unknown=key_path)
        elif kind == "missing":
            yield Problem(key_path, "required")
        elif kind == "value_error":
            yield from _problems_of(key_path, detail["ctx"]["error"])
        else:
            key = next((str(part) for part in reversed(path) if part in LISTS), "")
            known = EXPECTED_AT.get((kind, key), EXPECTED.get(kind))
            found, expected = f"{value!r:.60}", known or detail["msg"].removeprefix(SHOULD)
            told = known is not None or detail["msg"].startswith(SHOULD)
            yield problem_at(key_path, FOUND if told else "found {found}, {expected}", found=found, expected=expected)


def _form_at(path: tuple[int | str, ...], recipe: type[Strict]) -> type[Strict]:
    """The form that has an unknown key at a path."""
    if len(path) < 3:
        return Push if path[0] == "push" else recipe
    forms: dict[str, type[Strict]] = {"models": ModelEntry, "sources": ModelEntry}
    forms |= {"slices": SliceEntry, "modules": ModuleEntry, "adapters": AdapterEntry}
    return forms[str(path[-3])]


def without_faults(data: Mapping[str, Any], error: ValidationError) -> dict[str, Any]:
    """A copy of `data` less the keys that `error` names."""
    rest: dict[str, Any] = deepcopy(dict(data))
    for path in (detail["loc"] for detail in error.errors() if detail["loc"]):
        *outer, key = path[:1] if path[0] == "push" else path
        parent: Any = rest
        for part in outer:
            known = parent if isinstance(parent, Mapping) else range(len(parent)) if isinstance(parent, list) else ()
            parent = parent[part] if part in known else None
        if isinstance(parent, dict):
            parent.pop(key, None)
    return rest


def without_keys(data: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """A copy of `data` less the keys at these places."""
    rest: dict[str, Any] = deepcopy(dict(data))
    for path in paths:
        steps, behind = find_steps(rest, path)
        if not behind:
            parent = reduce(getitem, steps[:-1], rest)
            del parent[steps[-1]]
    return rest
