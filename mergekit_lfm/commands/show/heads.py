"""Show models with new heads."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mergekit_lfm.commands.show.outcomes import outcome_data
from mergekit_lfm.commands.show.terminal import table

if TYPE_CHECKING:
    from mergekit_lfm.api.heads import NewHead, PlannedHead
    from mergekit_lfm.api.outcome import Outcome


def plan_data(planned: PlannedHead) -> dict[str, Any]:
    """A planned head for JSON."""
    return {"out": str(planned.out), "recipe": planned.recipe.normalised(), "warnings": list(planned.notices)}


def plan_text(planned: PlannedHead) -> str:
    """A planned head as a table."""
    recipe = planned.recipe
    rows = [("head", f"a new one for {recipe.model}"), ("labels", ", ".join(recipe.labels))]
    return table([*rows, ("write", str(planned.out)), *(("note", text) for text in planned.notices)])


def done_data(outcome: Outcome[NewHead]) -> dict[str, Any]:
    """A new head for JSON."""
    return {**outcome_data(outcome), **asdict(outcome.result)}


def done_text(outcome: Outcome[NewHead]) -> str:
    """The new parameters."""
    if outcome.already_there:
        return "already there: the result of the same request; nothing was done"
    return f"new: {', '.join(outcome.result.added)}"
