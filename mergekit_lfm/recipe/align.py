"""Requests for an alignment, and the check of their parameters. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_lfm.errors import did_you_mean
from mergekit_lfm.methods.method import Value
from mergekit_lfm.recipe.files import Where, read_file
from mergekit_lfm.recipe.options import defaults_of, read_options, readers_of, unknown_method
from mergekit_lfm.recipe.problems import Problem, problem_at, refuse
from mergekit_lfm.recipe.registry import ALIGN_METHODS
from mergekit_lfm.recipe.values import FOUND, NamedFile


@dataclass(frozen=True, slots=True)
class AlignRequest:
    """A request to align a model to another, whose label in the recipe is `to`. options: all of the method's."""

    to: str
    method: str
    options: tuple[tuple[str, Value], ...]
    stats: NamedFile | None = None

    def as_data(self) -> dict[str, Any]:
        """The request as in a recipe."""
        stats = {} if self.stats is None else {"stats": self.stats.ref}
        return {"to": self.to, "method": self.method, **dict(self.options), **stats}


def align_options(method: str, given: Mapping[str, Any], *, statistics: bool, place: str = "align") -> dict[str, Value]:
    """The value of every parameter with an effect. Raises PlanError with a list of all problems.

    statistics: True with a statistics file. place: the request's name in messages.
    """
    values, problems = read_align_options(method, given, statistics=statistics, place=place)
    refuse(problems)
    return values


def read_align_options(
    method: str, given: Mapping[str, Any], *, statistics: bool, place: str
) -> tuple[dict[str, Value], list[Problem]]:
    """The same, with all problems."""
    if method not in ALIGN_METHODS:
        return {}, [unknown_method(method, ALIGN_METHODS, place)]
    declared = ALIGN_METHODS[method]
    idle = declared.idle if statistics else ()

    def refuse_idle(_: object) -> None:
        raise ValueError(f"with statistics {method} finds every group at once; remove it")

    readers = readers_of(declared.parameters) | dict.fromkeys(idle, refuse_idle)
    values, problems = read_options(given, readers, method, place)
    if declared.statistics == "required" and not statistics:
        advice = "Collect them with `mergekit-lfm stats cross A B --data FILE ...`"
        needs = f"{method} needs cross moments of both models on the same data. {advice}"
        problems.append(Problem(f"{place}.stats", needs))
    if declared.statistics == "no" and statistics:
        text = f"{method} reads no statistics; remove them, or choose another method"
        problems.append(Problem(f"{place}.stats", text))
    defaults = {name: value for name, value in defaults_of(declared.parameters).items() if name not in idle}
    return defaults | values, problems


def read_align_request(
    given: Mapping[str, Any], models: Mapping[str, str], where: Where, place: str
) -> tuple[AlignRequest | None, list[Problem]]:
    """The request in a mapping {to, method, ...}; or None, and the problems of the first part with any.

    models: those that are not aligned themselves, as written, by label.
    """
    rest = dict(given)
    to, method, stats = rest.pop("to", None), rest.pop("method", "weight_matching"), rest.pop("stats", None)
    if not isinstance(to, str) or not isinstance(method, str) or not isinstance(stats, str | None):
        expected = "{to: MODEL, method: NAME}, and `stats` as a file's name"
        return None, [problem_at(place, FOUND, found=repr(dict(given)), expected=expected)]
    label = next((label for label, ref in models.items() if to in (label, ref)), None)
    if label is None:
        expected, cure = "a model of this recipe that is not aligned itself", did_you_mean(to, models)
        return None, [problem_at(f"{place}.to", FOUND + "; {cure}", found=repr(to), expected=expected, cure=cure)]
    options, problems = read_align_options(method, rest, statistics=stats is not None, place=place)
    file = None
    if not problems and stats is not None:
        expected = "a file made by `mergekit-lfm stats cross`"
        file, problems = read_file(stats, where, f"{place}.stats", expected)
    return None if problems else AlignRequest(label, method, tuple(options.items()), file), problems
