"""Read the options of a request: one value for each parameter of its method. Every problem has its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from mergekit_lfm.errors import did_you_mean
from mergekit_lfm.methods.method import Parameter, Required, Value
from mergekit_lfm.recipe.problems import Problem, attempt, problem_at
from mergekit_lfm.recipe.values import read_value

Reader = Callable[[Any], Any]  # from what YAML gives to the value; ValueError with the value and the expectation


def unknown_method(name: str, methods: Iterable[str], place: str) -> Problem:
    """The problem of a name that is not among the methods."""
    return problem_at(
        f"{place}.method", "unknown method {found}, {cure}", found=repr(name), cure=did_you_mean(name, methods)
    )


def defaults_of(parameters: Iterable[Parameter]) -> dict[str, Value]:
    """The default of every parameter of a method that requires none."""
    return {p.name: p.default for p in parameters if not isinstance(p.default, Required)}


def readers_of(parameters: Iterable[Parameter]) -> dict[str, Reader]:
    """For each parameter, the function that reads its value; None stands for a default of None."""

    def read(parameter: Parameter, raw: object) -> Value:
        return None if raw is None and parameter.default is None else read_value(raw, parameter)

    return {parameter.name: partial(read, parameter) for parameter in parameters}


def read_options(
    given: Mapping[str, Any], readers: Mapping[str, Reader], method: str, place: str, *, noun: str = "parameter"
) -> tuple[dict[str, Any], list[Problem]]:
    """The values given, each read by the reader of its name, and all problems. noun: what messages call them."""
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, raw in given.items():
        at = f"{place}.{name}"
        if name not in readers:
            cure = did_you_mean(name, readers)
            text = "{method} has no such {noun}, {cure}"
            problem = problem_at(at, text, method=method, noun=noun, found=name, cure=cure)
            problems.append(problem._replace(unknown=at))
            continue
        value, wrong = attempt(partial(readers[name], raw), at)
        problems += wrong
        if not wrong:
            values[name] = value
    return values, problems
