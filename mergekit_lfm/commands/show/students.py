"""Show smaller models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mergekit_lfm.commands.show.outcomes import outcome_data
from mergekit_lfm.commands.show.terminal import table

if TYPE_CHECKING:
    from mergekit_lfm.api.outcome import Outcome
    from mergekit_lfm.api.students import PlannedStudent, Student


def plan_data(planned: PlannedStudent) -> dict[str, Any]:
    """A planned student for JSON."""
    return {
        "out": str(planned.out),
        "recipe": planned.recipe.normalised(),
        "layers": list(planned.layers),
        "of": planned.of,
        "units": 0 if planned.mlps is None else planned.mlps.kept,
        "of_units": 0 if planned.mlps is None else planned.mlps.of,
        "warnings": list(planned.notices),
    }


def plan_text(planned: PlannedStudent) -> str:
    """A planned student as a table."""
    recipe, rows = planned.recipe, [("student", f"from {planned.recipe.model}")]
    if planned.layers:
        rows.append(("layers", _layers(planned.layers, planned.of)))
    if planned.mlps is not None:
        rows.append(("MLPs", f"{planned.mlps.kept} of {planned.mlps.of} units in each"))
        if not recipe.random:
            rows.append(("units", f"ranked by {recipe.stats or 'the norms of their weights'}"))
    if recipe.random:
        rows.append(("weights", f"random, seed {recipe.seed or 0}"))
    return table([*rows, ("write", str(planned.out)), *(("note", text) for text in planned.notices)])


def done_data(outcome: Outcome[Student]) -> dict[str, Any]:
    """A student for JSON."""
    return {**outcome_data(outcome), **asdict(outcome.result)}


def done_text(outcome: Outcome[Student]) -> str:
    """The parts that stay."""
    if outcome.already_there:
        return "already there: the result of the same request; nothing was done"
    return "\n".join(_lines(outcome.result))


def _lines(student: Student) -> Iterator[str]:
    if student.layers:
        yield f"layers: {_layers(student.layers, student.of)}"
    if student.units:
        yield f"MLPs: {student.units} of {student.of_units} units in each"
    if student.seed is not None:
        yield f"weights: random, seed {student.seed}"
    share = student.parameters / max(1, student.of_parameters)
    yield f"kept: {student.parameters:,} of {student.of_parameters:,} parameters, {share:.1%}"


def _layers(layers: tuple[int, ...], of: int) -> str:
    return f"{', '.join(map(str, layers))} of {of}"
