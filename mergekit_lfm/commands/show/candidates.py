"""Show the examples that are selected from a pool."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mergekit_lfm.commands.show.outcomes import outcome_data

if TYPE_CHECKING:
    from mergekit_lfm.api.outcome import Outcome
    from mergekit_lfm.api.select import Selected


def selected_data(outcome: Outcome[Selected]) -> dict[str, Any]:
    """The selected lines, with the worth of each, for JSON."""
    return {**outcome_data(outcome), **asdict(outcome.result)}


def selected_text(outcome: Outcome[Selected]) -> str:
    """How many lines there are, and how much the first and the last one are worth."""
    chosen = outcome.result
    first, last = chosen.worth[0], chosen.worth[-1]
    return f"{len(chosen.lines):,} of {chosen.pool:,} lines, worth {first:.4g} to {last:.4g}"
