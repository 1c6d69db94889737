"""Show judgements of a recipe: what is judged on what, and the scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_lfm.commands.show.evaluations import evaluation_data, matrix_text
from mergekit_lfm.commands.show.outcomes import outcome_data
from mergekit_lfm.commands.show.terminal import table

if TYPE_CHECKING:
    from mergekit_lfm.api.eval_plans import PlannedEval, Scores
    from mergekit_lfm.api.outcome import Outcome


def plan_data(planned: PlannedEval) -> dict[str, Any]:
    """A planned judgement for JSON."""
    return {"out": str(planned.out), "recipe": planned.recipe.normalised(), "warnings": list(planned.notices)}


def plan_text(planned: PlannedEval) -> str:
    """A planned judgement as a table."""
    recipe = planned.recipe
    rows = [*(("judge", model) for model in recipe.models), *(("data", name) for name in recipe.data)]
    rows += [("task", recipe.task), ("write", f"a file of scores, {planned.out}")]
    return table([*rows, *(("note", text) for text in planned.notices)])


def done_data(outcome: Outcome[Scores]) -> dict[str, Any]:
    """The scores for JSON."""
    return {**outcome_data(outcome), "models": evaluation_data(outcome.result)}


def done_text(outcome: Outcome[Scores]) -> str:
    """The scores, one row for each model."""
    return matrix_text(outcome.result)
