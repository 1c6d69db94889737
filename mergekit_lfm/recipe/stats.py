"""The check of a statistic's parameters. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_lfm.errors import PlanError
from mergekit_lfm.methods.method import Value
from mergekit_lfm.recipe.options import defaults_of, read_options, readers_of
from mergekit_lfm.recipe.problems import refuse
from mergekit_lfm.recipe.registry import STATISTIC_METHODS


def statistic_options(kind: str, given: Mapping[str, Any], *, place: str = "stats") -> dict[str, Value]:
    """The value of every parameter. Raises PlanError for an unknown kind, or with a list of all problems.

    place: the request's name in messages.
    """
    if kind not in STATISTIC_METHODS:
        names = ", ".join(STATISTIC_METHODS)
        raise PlanError(f"found the kind {kind!r}, expected one of {names}; choose one of these")
    parameters = STATISTIC_METHODS[kind].parameters
    values, problems = read_options(given, readers_of(parameters), kind, place)
    refuse(problems)
    return defaults_of(parameters) | values
