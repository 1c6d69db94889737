"""The parameters of a way to tune, checked. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit_lfm.methods.kinds import TuneMethod
from mergekit_lfm.methods.method import Value
from mergekit_lfm.recipe.options import defaults_of, read_options, readers_of
from mergekit_lfm.recipe.problems import Problem, problem_at, refuse
from mergekit_lfm.recipe.registry import TUNE_METHODS
from mergekit_lfm.recipe.values import FOUND


def tune_options(method: str, given: Mapping[str, Any]) -> dict[str, Value]:
    """A value for each parameter of a tuning method, of those given or the default. Raises PlanError for wrong ones."""
    values, problems = read_parameters(TUNE_METHODS[method], given)
    refuse(problems)
    return values


def read_parameters(method: TuneMethod[Any], given: Mapping[str, Any]) -> tuple[dict[str, Value], list[Problem]]:
    """A value for each parameter of the method, of those given or the default, and the problems with these."""
    values, problems = read_options(given, readers_of(method.parameters), method.name, "parameters")
    own = {parameter.name for parameter in method.parameters}
    for name in given.keys() - own:
        owners = [each.name for each in TUNE_METHODS.values() if name in {p.name for p in each.parameters}]
        if owners:
            problems = [each for each in problems if each.place != f"parameters.{name}"]
            sentence = "{method} has no such parameter; {owners} have it"
            problems.append(problem_at(f"parameters.{name}", sentence, method=method.name, owners=", ".join(owners)))
    return {**defaults_of(method.parameters), **values}, problems


def check_makes(method: TuneMethod[Any]) -> Iterator[Problem]:
    """The problem of a method whose result is more than a model, a patch or one adapter."""
    if method.makes in ("prompt", "mixture", "template") or method.tasks or method.name == "adamix":
        expected = "a method that trains a model, a patch, or one adapter"
        yield problem_at("method", FOUND, found=method.name, expected=expected)
