"""Filters of a recipe that match no tensor: a slip of the pen, never meant."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from mergekit_lfm.arch.ties import is_tied
from mergekit_lfm.errors import PlanError, did_you_mean, several
from mergekit_lfm.plan.roles import PartRoles
from mergekit_lfm.recipe.values import Setting

HEADS = ("lm_head", "embed_out", "output", "proj_out")  # which a tied model does not store


def refuse_idle_filters(roles: Sequence[PartRoles]) -> None:
    """Raise PlanError about all filters of the recipe that match no tensor of the parts that they are for.

    The head of a model that ties it may be named: where it is stored, the filter is for it.
    """
    names: dict[str, dict[str, None]] = {}  # of the tensors that a place in the recipe is about
    filters: dict[str, dict[str, None]] = {}
    for part in roles:
        tied = any(is_tied(model.config) is not False for model in part.models)
        for place, pattern, seen in _filters_of(part):
            names.setdefault(place, {}).update(dict.fromkeys((*seen, *(HEADS if tied else ()))))
            filters.setdefault(place, {})[pattern] = None
    problems = []
    for place, patterns in filters.items():
        for pattern in patterns:
            if not any(pattern in name for name in names[place]):
                words = dict.fromkeys(word for name in names[place] for word in _words(name))
                cure = did_you_mean(pattern, words)
                problems.append(f"{place}: filter {pattern!r} is part of no tensor's name, {cure}")
    if problems:
        raise PlanError(several("filters match nothing", problems))


def _filters_of(roles: PartRoles) -> Iterator[tuple[str, str, Collection[str]]]:
    """Each filter in the settings of a part, the place of the setting, and the names that it looks at.

    Those of the inputs' own parameters look at the names in the input, which has a slice's layers under other numbers.
    """
    part = roles.part
    settings = (scope.settings for model in (None, *part.inputs) for scope in part.scopes_of(model))
    if not any(True for each in settings for setting in each.values() for _ in _patterns(setting)):
        return
    outputs = dict.fromkeys(name for model in roles.models for name in model)
    inputs = [[roles.refer(i, name)[1] for name in roles.models[i]] for i in roles.inputs]
    for model, names in [(None, outputs), *zip(part.inputs, inputs, strict=True)]:
        for scope in part.scopes_of(model):
            for name in (each.name for each in part.parameters_of(model) if each.name in scope.settings):
                yield from ((f"{scope.place}.{name}", text, names) for text in _patterns(scope.settings[name]))


def _patterns(setting: Setting) -> Iterator[str]:
    return (rule.filter for rule in setting if rule.filter is not None)


def _words(name: str) -> list[str]:
    """The parts of a name that filters are made of: without numbers."""
    parts = [part for part in name.split(".") if not re.fullmatch(r"\d+", part)]
    return [*parts, ".".join(parts[-2:])]
