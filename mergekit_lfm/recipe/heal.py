"""`heal: {teachers: [...], data: ...}` in a document: what it makes is distilled from teachers, a stage more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit_lfm.errors import PlanError
from mergekit_lfm.recipe.values import FOUND

HEAL = "heal"
NAME = "{}-unhealed"  # of the stage that makes the student
OF_OUTPUT = ("output", "push")  # keys of the stage that makes the output
TAKEN = ("job", "model", "name")  # keys that the two stages have by themselves


def split_heals(documents: Sequence[object], label: str) -> Iterator[tuple[object, int]]:
    """The documents of a recipe, each with its index; one with `heal` as two, the second a distillation of the first.

    Raises PlanError for a `heal` of another form, or that names its own student.
    """
    for index, data in enumerate(documents):
        if not isinstance(data, Mapping) or HEAL not in data:
            yield data, index
            continue
        heal, name = data[HEAL], NAME.format(data.get("name") or "result")
        taken = [key for key in TAKEN if isinstance(heal, Mapping) and key in heal]
        if not isinstance(heal, Mapping) or taken:
            found = f"{heal!r:.40}" if not taken else " and ".join(taken)
            expected = "a mapping with teachers, data and task; the document's result is the student"
            raise PlanError(f"{label}: {HEAL}: {FOUND.format(found=found, expected=expected)}")
        yield {**{key: value for key, value in data.items() if key not in (HEAL, *OF_OUTPUT)}, "name": name}, index
        last: dict[str, Any] = {key: data[key] for key in ("name", *OF_OUTPUT) if key in data}
        yield {**last, "job": "distill", "model": name, **heal}, index
