"""The interface of a kind of statistic: its entries, their sums over batches, and the stored tensors.

The driver knows nothing else about a statistic. It divides the units into passes that fit the memory, keeps the sums
across interruptions, and writes the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from mergekit_lfm.artifacts.statistics import Layer
from mergekit_lfm.errors import PlanError
from mergekit_lfm.methods.kinds import Options, StatisticMethod
from mergekit_lfm.runtime.subject import Subject

if TYPE_CHECKING:
    from mergekit_lfm.runtime.batches import Batch

FILTERED = "left out: no name that was asked for is part of its name"


@dataclass(frozen=True)
class StatisticsRequest:
    """The input of a statistic: as many subjects as its method says. options: the parameters with an effect.

    memory: the bytes that sums may take; the numbers do not depend on it.
    """

    subjects: tuple[Subject, ...]
    data: Sequence[Batch]
    task: str
    layers: tuple[str, ...]
    memory: int
    options: Options = field(default_factory=dict)

    @cached_property
    def examples(self) -> int:
        """The number of examples in the data."""
        return sum(map(len, self.data))

    def whole(self, name: str) -> int:
        """The value of a parameter that is a whole number."""
        value = self.options[name]
        assert isinstance(value, int)
        return value


class Statistic(Protocol):
    """One kind of statistic, prepared for a request: it knows the layout of its file.

    units: the parts that separate passes can collect, each with its tensors in the file and their shapes. skipped: the
    layers or parameters that it does not cover, and why.
    """

    units: dict[str, dict[str, tuple[int, ...]]]
    skipped: dict[str, str]

    def add(self, batch: Batch, sums: Mapping[str, Tensor]) -> None:
        """Add a batch to the sums of some of the units: float64, in the shapes of the units' tensors."""

    def finish(self, unit: str, sums: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """Turn a unit's sums over all batches, in place, into its stored tensors; also return their token count."""

    def layers(self, counts: Mapping[str, int]) -> dict[str, Layer]:
        """The covered layers, with the counts of their units; {} for a statistic of parameters."""

    def norm(self, squares: float) -> float | None:
        """The norm for the file, from the sum of all entries' squares; None for none. Raises PlanError if it is 0."""


@dataclass(frozen=True, slots=True)
class Outline:
    """A statistics file as far as it is known before the model runs. entries: the shapes of its tensors, by name."""

    entries: Mapping[str, tuple[int, ...]]
    layers: Mapping[str, Layer] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    norm: float | None = None


Collector = StatisticMethod[Callable[[StatisticsRequest], Statistic]]


def select_names(names: Sequence[str], patterns: Sequence[str], what: str) -> set[str]:
    """The names that contain one of the patterns; all without patterns. Raises PlanError if a pattern matches none."""
    unmatched = [pattern for pattern in patterns if not any(pattern in name for name in names)]
    if unmatched or not names:
        examples = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        wanted = f"with {', '.join(map(repr, unmatched))} in the name" if unmatched else "in the model"
        raise PlanError(f"found no {what} {wanted}; there are {examples or 'none'}. Choose among these names")
    return {name for name in names if not patterns or any(pattern in name for pattern in patterns)}
