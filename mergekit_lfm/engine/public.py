"""The recipe and the names of its inputs as an output's documents show them: without the folders of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from mergekit_lfm.machine.secrets import mask_secrets
from mergekit_lfm.output.names import last_name, public_names
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.recipe.adapters import join_reference
from mergekit_lfm.store.yaml import read_yaml

PATH = re.compile(r"(?<![\w./:~-])(~/|/[\w.-]+/)")  # of this machine, or of another


def names_of(plan: Plan) -> dict[str, str]:
    """The `public_names` of a plan's models and statistics files; for a model on the Hub its name and commit."""
    inputs = [*zip(plan.recipe.all_models, plan.models, strict=True)]
    commits = {model.label: m.snapshot.public for model, m in inputs if m.snapshot is not None}
    adapted = {model.label for model, _ in inputs if model.adapters}
    names = public_names(label for label in plan.source_labels if label not in adapted) | commits
    taken = {name for label, name in names.items() if label not in adapted}
    for model in (model for model, _ in inputs if model.adapters):
        adapters = [(last_name(adapter.ref), adapter.scale) for adapter in model.adapters]
        name = join_reference(commits.get(model.label, last_name(model.model_ref)), adapters)
        if name in taken:
            name = next(numbered for n in count(2) if (numbered := f"{name} ({n})") not in taken)
        names[model.label] = name
        taken.add(name)
    return names


def public_recipe(plan: Plan) -> dict[str, Any]:
    """The normalised recipe with the names of `names_of`."""
    recipe, names = plan.recipe.normalised(), names_of(plan)
    return {key: _public(key, value, names) for key, value in recipe.items()}


def _public(key: str, value: Any, names: Mapping[str, str]) -> Any:
    """The value of a key of the recipe, or of a part of it."""
    if key in ("model", "stats", "base_model"):
        return value and names[value]
    if key == "align":
        return _public_align(value, names)
    if key == "edits":
        return _public_edits(value)
    if key == "tokenizer":
        return _public_tokenizer(value, names)
    if key in ("models", "slices", "sources"):
        return [{k: _public(k, v, names) for k, v in entry.items()} for entry in value]
    if key == "modules":
        return {name: {k: _public(k, v, names) for k, v in entry.items()} for name, entry in value.items()}
    return value


def _public_tokenizer(data: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A recipe's `tokenizer` with the names of its models."""
    public = {**data, "source": names.get(data["source"], data["source"])}
    if "tokens" in data:
        public["tokens"] = {text: _public_token(token, names) for text, token in data["tokens"].items()}
    return public


def _public_token(token: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    source = token.get("source", {})
    return {**token, "source": {**source, "model": names[source["model"]]}} if "model" in source else token


def _public_edits(edits: list[str | dict[str, Any]]) -> list[str | dict[str, Any]]:
    """A recipe's `edits` without the folders of this machine."""
    files = ("facts", "stats")
    return [
        last_name(edit)
        if isinstance(edit, str)
        else {key: last_name(value) if key in files else value for key, value in edit.items()}
        for edit in edits
    ]


def _public_align(align: str | dict[str, Any], names: Mapping[str, str]) -> str | dict[str, Any]:
    """A model's `align` without the folders of this machine."""
    if isinstance(align, str):
        return last_name(align)
    stats = {"stats": last_name(align["stats"])} if "stats" in align else {}
    return {**align, "to": names[align["to"]], **stats}


def short_recipe(plan: Plan) -> dict[str, Any]:
    """The recipe in the documents for people: without what it leaves out."""
    return {key: _short(value) for key, value in public_recipe(plan).items() if value not in (None, {})}


def _short(value: Any) -> Any:
    """A list of the recipe's without the settings that its entries do not have."""
    if isinstance(value, list):
        return [_short(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {key: _short(each) for key, each in value.items() if each not in (None, {})}


def own_text(plan: Plan) -> str | None:
    """The recipe as written, with names in place of paths; None without a text, or if it would show private data."""
    text = plan.recipe.text
    if text is None:
        return None
    names = {model.ref: names_of(plan)[model.label] for model in plan.recipe.all_models}
    away = {value for value in _texts(read_yaml(text, "recipe")) if last_name(value) != value}
    for value in sorted(away, key=len, reverse=True):
        text = text.replace(value, names.get(value, last_name(value)))
    return text if mask_secrets(text) == text and not PATH.search(text) else None


def _texts(data: Any) -> Iterator[str]:
    """All texts in parsed YAML."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping | list):
        for part in data.values() if isinstance(data, Mapping) else data:
            yield from _texts(part)
