"""Filters of a recipe that match no tensor: a slip of the pen, never meant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

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
    filters: dict[str, list[str]] = {}
    for part in roles:
        found = list(_filters_of(part))
        tied = any(is_tied(model.config) is not False for model in part.models)
        own = [part.refer(i, name)[1] for i in part.inputs for name in part.models[i]] if found else []  # of slices
        seen = [*(name for model in part.models for name in model), *own, *(HEADS if tied else ())] if found else []
        for place, pattern in found:
            names.setdefault(place, {}).update(dict.fromkeys(seen))
            filters.setdefault(place, []).append(pattern)
    problems = []
    for place, patterns in filters.items():
        for pattern in dict.fromkeys(patterns):
            if not any(pattern in name for name in names[place]):
                words = dict.fromkeys(word for name in names[place] for word in _words(name))
                cure = did_you_mean(pattern, words)
                problems.append(f"{place}: filter {pattern!r} is part of no tensor's name, {cure}")
    if problems:
        raise PlanError(several("filters match nothing", problems))


def _filters_of(roles: PartRoles) -> Iterator[tuple[str, str]]:
    """Each filter in the settings of a part, and the place of the setting."""
    scopes = [scope for model in (None, *roles.part.inputs) for scope in roles.part.scopes_of(model)]
    for scope in scopes:
        for name, setting in scope.settings.items():
            yield from ((f"{scope.place}.{name}", pattern) for pattern in _patterns(setting))


def _patterns(setting: Setting) -> Iterator[str]:
    return (rule.filter for rule in setting if rule.filter is not None)


def _words(name: str) -> list[str]:
    """The parts of a name that filters are made of: without numbers."""
    parts = [part for part in name.split(".") if not re.fullmatch(r"\d+", part)]
    return [*parts, ".".join(parts[-2:])]
