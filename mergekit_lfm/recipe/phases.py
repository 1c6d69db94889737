"""The parts of a model that a tuning trains, as a recipe names them: patterns for the names of parameters."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from mergekit_lfm.recipe.form import Strict


def _as_patterns(value: object) -> object:
    """One pattern or several."""
    return (value,) if isinstance(value, str) else value


Patterns = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_patterns), Field(min_length=1)
]


class PhaseEntry(Strict):
    """A phase of a training: its steps, and patterns for the names of the parameters that are trained in it."""

    steps: int = Field(strict=True, ge=1)
    train: Patterns


class GroupEntry(Strict):
    """Parameters whose names match a pattern, with a learning rate or a weight decay of their own."""

    match: str
    learning_rate: float | None = None
    weight_decay: float | None = None
