"""Show emulators of models, and models with their tuned ends."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mergekit_lfm.commands.show.outcomes import outcome_data
from mergekit_lfm.commands.show.terminal import table

if TYPE_CHECKING:
    from mergekit_lfm.api.offsite import Emulator, PluggedIn
    from mergekit_lfm.api.outcome import Outcome


def emulator_data(outcome: Outcome[Emulator]) -> dict[str, Any]:
    """An emulator for JSON."""
    return {**outcome_data(outcome), **asdict(outcome.result)}


def emulator_text(outcome: Outcome[Emulator]) -> str:
    """The layers that stay, and the options that train the ends."""
    made = outcome.result
    options = " ".join(f"--train {shlex.quote(pattern)}" for pattern in made.train)
    rows = [("layers", f"{_layers(made.layers, made.of)}; {made.ends} at each end to tune"), ("tune", options)]
    return table(rows)


def plugged_data(outcome: Outcome[PluggedIn]) -> dict[str, Any]:
    """A model with tuned ends for JSON."""
    return {**outcome_data(outcome), **asdict(outcome.result)}


def plugged_text(outcome: Outcome[PluggedIn]) -> str:
    """The layers that are tuned."""
    return f"tuned: {_layers(outcome.result.tuned, outcome.result.of)}"


def _layers(layers: Sequence[int], of: int) -> str:
    return f"{len(layers)} of {of}: {', '.join(map(str, layers))}"
