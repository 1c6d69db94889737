"""Requests for an alignment, and the check of their parameters. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_lfm.errors import PlanError
from mergekit_lfm.methods.method import Value
from mergekit_lfm.recipe.registry import ALIGN_METHODS
from mergekit_lfm.recipe.values import NamedFile, defaults_of, find_method, read_options, readers_of


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
    declared = find_method(method, ALIGN_METHODS, place)
    idle = declared.idle if statistics else ()

    def refuse(_: object, at: str) -> None:
        raise ValueError(f"{at}: with statistics {method} finds every group at once; remove it")

    readers = readers_of(declared.parameters) | dict.fromkeys(idle, refuse)
    values, problems = read_options(given, readers, method, place)
    if declared.statistics == "required" and not statistics:
        problems.append(
            f"{place}.stats: {method} needs cross moments of both models on the same data. Collect them with "
            "`mergekit-lfm stats cross A B --data FILE ...`"
        )
    if declared.statistics == "no" and statistics:
        problems.append(f"{place}.stats: {method} reads no statistics; remove them, or choose another method")
    if problems:
        raise PlanError("\n".join(problems))
    defaults = {name: value for name, value in defaults_of(declared.parameters).items() if name not in idle}
    return defaults | values
