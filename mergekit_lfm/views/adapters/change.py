"""The change that an adapter makes to one tensor: the contract, and the changes that most kinds share.

A change gets a panel of the tensor's rows, [rows, numbers in a row], in the dtype of the arithmetic, and returns them
changed; it may change them in place. A tensor with one axis is a column. A change is data, and pickles.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from mergekit_lfm.store.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Panel:
    """Rows `first` up to `last` of a tensor before a change, and what a change may read besides.

    part: a tensor of the adapter, in the dtype of the arithmetic. panels: all panels of the tensor before the change,
    in order. once: the result of a function, kept for the panels of the same tensor that follow.
    """

    x: Tensor
    first: int
    last: int
    part: Callable[[TensorSpec], Tensor]
    panels: Callable[[], Iterator[Panel]]
    once: Callable[[Callable[[], Tensor]], Tensor]


class Change(ABC):
    """Its heirs are final. One that adds something has a field `scale`, a factor of what it adds."""

    @property
    @abstractmethod
    def parts(self) -> tuple[TensorSpec, ...]:
        """The adapter's tensors that it reads, whole."""

    @abstractmethod
    def apply(self, panel: Panel) -> Tensor:
        """The panel's rows after the change."""

    def scratch(self, rows: int) -> int:  # noqa: ARG002
        """The numbers that it holds besides, for a panel of so many rows."""
        return 0


def scaled(change: Change, share: float) -> Change:
    """A share of a change: of what it adds, if it is a sum, else of the difference that it makes."""
    scale = getattr(change, "scale", None)
    return Partial(change, share) if scale is None else replace(cast(Any, change), scale=scale * share)


@dataclass(frozen=True, slots=True)
class Partial(Change):
    """A share of another change: x + scale (changed x - x)."""

    change: Change
    scale: float

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return self.change.parts

    def scratch(self, rows: int) -> int:
        return self.change.scratch(rows)

    def apply(self, panel: Panel) -> Tensor:
        before = panel.x.clone()
        after = self.change.apply(panel)
        return before + (after - before) * self.scale


@dataclass(frozen=True, slots=True)
class Replaced(Change):
    """The adapter's tensor in place of the model's."""

    new: TensorSpec

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return (self.new,)

    def apply(self, panel: Panel) -> Tensor:
        new = panel.part(self.new)
        return new.reshape(new.shape[0] if new.ndim else 1, -1)[panel.first : panel.last].clone()


@dataclass(frozen=True, slots=True)
class Added(Change):
    """scale times a tensor of the adapter, added: what the bias of a LoRA's B does to the bias of its layer."""

    added: TensorSpec
    scale: float

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return (self.added,)

    def scratch(self, rows: int) -> int:
        return rows

    def apply(self, panel: Panel) -> Tensor:
        return panel.x.add_(panel.part(self.added).reshape(-1, 1)[panel.first : panel.last] * self.scale)


@dataclass(frozen=True, slots=True)
class Rows(Change):
    """The adapter's rows in place of some of the model's: those of the tokens that were trained."""

    new: TensorSpec
    indices: tuple[int, ...]

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return (self.new,)

    def apply(self, panel: Panel) -> Tensor:
        new = panel.part(self.new)
        for i, row in enumerate(self.indices):
            if panel.first <= row < panel.last:
                panel.x[row - panel.first] = new[i].flatten()
        return panel.x


@dataclass(frozen=True, slots=True)
class Multiplied(Change):
    """Every row times its number, or every column, `across`: what IA3 does.

    Source: Liu et al. 2022, arXiv 2205.05638, section 3.3.
    """

    factors: TensorSpec
    across: bool

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return (self.factors,)

    def apply(self, panel: Panel) -> Tensor:
        factors = panel.part(self.factors).flatten()
        if not self.across:
            return panel.x.mul_(factors[panel.first : panel.last, None])
        size = panel.x.shape[1] // len(factors)  # of the kernel of a convolution, whose numbers follow one another
        return panel.x.mul_(factors.repeat_interleave(size))
