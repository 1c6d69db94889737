"""What a kind of statistic is: entries, sums over batches, and what is stored of the sums.

The driver knows no more of a statistic than this. It divides the units into passes that fit the memory, keeps the sums
across interruptions, and writes the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from mergekit_lfm.artifacts.statistics import Layer
from mergekit_lfm.errors import PlanError
from mergekit_lfm.runtime.subject import Subject

if TYPE_CHECKING:
    from mergekit_lfm.runtime.batches import Batch

FILTERED = "left out: no name that was asked for is part of its name"


@dataclass(frozen=True)
class Request:
    """What a statistic is asked for. Two subjects for "cross", else one; `labels` is None but for "fisher".

    memory: the bytes that sums may take, of which the numbers do not depend.
    """

    subjects: tuple[Subject, ...]
    data: Sequence[Batch]
    task: str
    labels: str | None
    samples: int
    seed: int
    layers: tuple[str, ...]
    memory: int

    @cached_property
    def examples(self) -> int:
        """How many there are in the data."""
        return sum(map(len, self.data))


class Statistic(Protocol):
    """One kind of statistic, made ready for a request: the layout of its file is known.

    units: what can be collected in separate passes, each with its tensors in the file and their shapes. skipped: the
    layers or parameters that it does not cover, and why.
    """

    units: dict[str, dict[str, tuple[int, ...]]]
    skipped: dict[str, str]

    def add(self, batch: Batch, sums: Mapping[str, Tensor]) -> None:
        """Add what a batch contributes to the sums, float64 in the shapes of the tensors, of some of the units."""

    def finish(self, unit: str, sums: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """What is stored of a unit, made in place of its sums over all batches, and how many tokens it is a mean of."""

    def layers(self, counts: Mapping[str, int]) -> dict[str, Layer]:
        """The layers that are covered, with the counts of their units; {} for a statistic of parameters."""


def chosen(names: Sequence[str], patterns: Sequence[str], what: str) -> set[str]:
    """The names with one of the patterns in them; all without patterns. PlanError for a pattern that is in none."""
    idle = [pattern for pattern in patterns if not any(pattern in name for name in names)]
    if idle or not names:
        some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        wanted = f"with {', '.join(map(repr, idle))} in the name" if idle else "in the model"
        raise PlanError(f"found no {what} {wanted}; there are {some or 'none'}. Choose among these names")
    return {name for name in names if not patterns or any(pattern in name for pattern in patterns)}
