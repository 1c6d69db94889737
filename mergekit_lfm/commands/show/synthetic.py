"""Show images that were made without data."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mergekit_lfm.commands.show.outcomes import outcome_data

if TYPE_CHECKING:
    from mergekit_lfm.api.outcome import Outcome
    from mergekit_lfm.api.synthesise import Synthesised


def synthesised_data(outcome: Outcome[Synthesised]) -> dict[str, Any]:
    """The result for JSON."""
    made = outcome.result
    paths = {
        "files": [str(path) for path in made.files],
        "student": None if made.student is None else str(made.student),
    }
    return {**outcome_data(outcome), **asdict(made), **paths}


def synthesised_text(outcome: Outcome[Synthesised]) -> str:
    """How many images there are, how sure the teacher is of them, and the student's agreement."""
    made = outcome.result
    form = " x ".join(map(str, made.shape))
    lines = [f"{made.count:,} images of {form}; the teacher gives its own classes {made.sureness:.1%} on average"]
    if made.student is not None and made.agreement is not None:
        lines.append(f"{made.student}: the student gives {made.agreement:.1%} of them the teacher's class")
    return "\n".join(lines)
