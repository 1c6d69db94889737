"""Show statistics of a recipe: what is collected, and what was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_lfm.commands.show.files import statistics_data, statistics_text
from mergekit_lfm.commands.show.outcomes import outcome_data
from mergekit_lfm.commands.show.terminal import table

if TYPE_CHECKING:
    from mergekit_lfm.api.outcome import Outcome
    from mergekit_lfm.api.stats_plans import PlannedStats
    from mergekit_lfm.artifacts.statistics import Statistics


def plan_data(planned: PlannedStats) -> dict[str, Any]:
    """Planned statistics for JSON."""
    return {"out": str(planned.out), "recipe": planned.recipe.normalised(), "warnings": list(planned.notices)}


def plan_text(planned: PlannedStats) -> str:
    """Planned statistics as a table."""
    recipe = planned.recipe
    rows = [("collect", recipe.method.summary.replace("MODEL", recipe.model)), ("data", recipe.data)]
    rows += [("task", recipe.task), ("write", f"a statistics file, {planned.out}")]
    return table([*rows, *(("note", text) for text in planned.notices)])


def done_data(outcome: Outcome[Statistics]) -> dict[str, Any]:
    """The statistics for JSON."""
    return {**outcome_data(outcome), **statistics_data(outcome.result)}


def done_text(outcome: Outcome[Statistics]) -> str:
    """The layers that the file covers."""
    if outcome.already_there:
        return "already there: the result of the same request; nothing was done"
    return statistics_text(statistics_data(outcome.result))
