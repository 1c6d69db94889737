"""Show texts that a model writes: from which prompts, and how many there are."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mergekit_lfm.commands.show.outcomes import outcome_data
from mergekit_lfm.commands.show.terminal import table

if TYPE_CHECKING:
    from mergekit_lfm.api.generate import Generated
    from mergekit_lfm.api.generate_plans import PlannedTexts
    from mergekit_lfm.api.outcome import Outcome


def plan_data(planned: PlannedTexts) -> dict[str, Any]:
    """Planned texts for JSON."""
    return {"out": str(planned.out), "recipe": planned.recipe.normalised(), "warnings": list(planned.notices)}


def plan_text(planned: PlannedTexts) -> str:
    """Planned texts as a table."""
    recipe, prompts = planned.recipe, len(planned.openings)
    rows = [("model", recipe.model), ("task", recipe.task)]
    rows += [] if recipe.data is None else [("prompts", f"{prompts:,} of {recipe.data}")]
    rows += [("texts", f"{prompts * recipe.count:,} of at most {recipe.max_new_tokens:,} tokens")]
    rows += [("write", f"a file of texts, {planned.out}")]
    return table([*rows, *(("note", text) for text in planned.notices)])


def done_data(outcome: Outcome[Generated]) -> dict[str, Any]:
    """The numbers of texts and tokens for JSON."""
    return {**outcome_data(outcome), **asdict(outcome.result)}


def done_text(outcome: Outcome[Generated]) -> str:
    """The numbers of texts and tokens."""
    if outcome.already_there:
        return "already there: the result of the same request; nothing was done"
    done = outcome.result
    return f"{done.texts:,} texts, {done.tokens:,} tokens; {done.ended:,} ended by themselves"
