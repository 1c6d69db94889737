"""`read_course`: the record of a training, from its file of metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_lfm.api.arguments import StrPath, expand
from mergekit_lfm.api.tune_plans import TRAINING
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.store.files import read_text
from mergekit_lfm.store.places import beside
from mergekit_lfm.train.state import METRICS

NUMBERS = ("step", "loss", "learning_rate")


def read_course(path: StrPath) -> list[Mapping[str, Any]]:
    """The lines of a training's record: step, loss, learning rate, and what else a line of metrics has.

    path: the file, the folder OUT.training, or OUT itself. Raises PlanError without such a file, FormatError for one
    that is not a record.
    """
    file = _find(expand(path))
    lines = list[Mapping[str, Any]]()
    for number, text in enumerate(read_text(file, most=None).splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or any(not isinstance(line.get(name), int | float) for name in NUMBERS):
            raise FormatError(
                f"{file}: line {number} is not a step of a training; expected {', '.join(NUMBERS)} in JSON. Give the "
                "metrics.jsonl that `mergekit-lfm tune` leaves"
            )
        lines.append(line)
    if not lines:
        raise FormatError(f"{file}: found no step; expected a line for each. Train longer")
    return lines


def _find(path: Path) -> Path:
    """The file of metrics that a path stands for."""
    places = (path / METRICS, beside(path, TRAINING) / METRICS, path)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise PlanError(f"found no {METRICS} at {path}; expected the OUT of a tuning, or OUT{TRAINING}. Give that")
    return found
