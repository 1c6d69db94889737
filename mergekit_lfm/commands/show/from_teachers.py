"""Show initialisations that are made from models without data."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mergekit_lfm.commands.show.outcomes import outcome_data
from mergekit_lfm.commands.show.terminal import table

if TYPE_CHECKING:
    from mergekit_lfm.api.meta_teachers import Initialised
    from mergekit_lfm.api.meta_teachers_plans import PlannedInitialisation
    from mergekit_lfm.api.outcome import Outcome


def plan_data(planned: PlannedInitialisation) -> dict[str, Any]:
    """A planned initialisation for JSON. memory: bytes of a step, None where the configs do not say."""
    found = {"out": str(planned.out), "recipe": planned.recipe.normalised(), "warnings": list(planned.notices)}
    return {**found, "memory": None if planned.need is None else planned.need.total}


def plan_text(planned: PlannedInitialisation) -> str:
    """A planned initialisation as a table."""
    recipe, row = planned.recipe, planned.recipe.row
    rows = [("meta", recipe.model), *(("teacher", name) for name in recipe.teachers)]
    rows += [("algorithm", f"{row.name}: {row.summary}"), ("write", f"a model, {planned.out}")]
    if planned.form is not None:
        shape, (low, high) = planned.form
        size = " x ".join(map(str, shape))
        rows.append(("images", f"{recipe.count} of each class, {size}, pixels from {low:g} to {high:g}"))
        rows.append(("a task", f"{recipe.shots} images of each class to adapt on, {recipe.queries} to judge by"))
        rows.append(("adapting", f"{recipe.inner_steps} steps at {recipe.inner_rate:g}"))
    if row.reads:
        before = f"{recipe.image_steps} of the images alone, then " if planned.form is not None else ""
        rows.append(("steps", f"{before}{recipe.steps}, learning rate {recipe.options.learning_rate:g}"))
    if planned.need is not None:
        rows.append(("memory of a step", str(planned.need)))
    return table([*rows, *(("note", text) for text in planned.notices)])


def done_data(outcome: Outcome[Initialised]) -> dict[str, Any]:
    """The result for JSON."""
    return {**outcome_data(outcome), **asdict(outcome.result)}


def done_text(outcome: Outcome[Initialised]) -> str:
    """The steps, the loss, and how often black boxes were asked."""
    if outcome.already_there:
        return "already there: the result of the same request; nothing was done"
    made = outcome.result
    rows = [("made", f"a model of {made.parameters:,} numbers by {made.algorithm}, from {made.teachers} teachers")]
    if made.loss is not None:
        rows.append(("loss", f"{made.loss:.4g}, the mean over the last tenth of {made.steps} steps"))
    if made.asked is not None:
        rows.append(("asked", f"{made.asked:,} images in {made.requests:,} requests"))
    return table(rows)
