"""Show images that were made without data."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mergekit_lfm.commands.show.outcomes import outcome_data
from mergekit_lfm.commands.show.terminal import table

if TYPE_CHECKING:
    from mergekit_lfm.api.outcome import Outcome
    from mergekit_lfm.api.synthesise import Synthesised
    from mergekit_lfm.api.synthesise_plans import PlannedImages


def plan_data(planned: PlannedImages) -> dict[str, Any]:
    """Planned images for JSON."""
    student = None if planned.student is None else str(planned.student[1])
    form = {"shape": [*planned.shape], "pixels": [*planned.pixels], "student": student}
    return {
        "out": str(planned.out),
        "recipe": planned.recipe.normalised(),
        **form,
        "warnings": list(planned.notices),
    }


def plan_text(planned: PlannedImages) -> str:
    """Planned images as a table."""
    recipe, row = planned.recipe, planned.recipe.row
    rows = [("teacher", entry.model) for entry in recipe.teachers]
    rows += [("preset", f"{row.name}: {row.summary}")]
    low, high = planned.pixels
    rows += [("images", f"{' x '.join(map(str, planned.shape))}, pixels from {low:g} to {high:g}")]
    rows += [("write", f"a file of images, {planned.out}")]
    rows += [] if planned.student is None else [("", f"{recipe.student} as it has learned, {planned.student[1]}")]
    return table([*rows, *(("note", text) for text in planned.notices)])


def done_data(outcome: Outcome[Synthesised]) -> dict[str, Any]:
    """The result for JSON."""
    made = outcome.result
    paths = {
        "files": [str(path) for path in made.files],
        "student": None if made.student is None else str(made.student),
    }
    return {**outcome_data(outcome), **asdict(made), **paths}


def done_text(outcome: Outcome[Synthesised]) -> str:
    """How many images there are, how sure the teacher is of them, and the student's agreement."""
    if outcome.already_there:
        return "already there: the result of the same request; nothing was done"
    made = outcome.result
    form = " x ".join(map(str, made.shape))
    lines = [f"{made.count:,} images of {form}; the teacher gives its own classes {made.sureness:.1%} on average"]
    if made.student is not None and made.agreement is not None:
        lines.append(f"{made.student}: the student gives {made.agreement:.1%} of them the teacher's class")
    return "\n".join(lines)
