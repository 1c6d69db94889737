"""The contract of aligners: an aligner's function takes an `AlignProblem` and returns an `AlignResult`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mergekit_lfm.align.correlations import Moments
from mergekit_lfm.align.pair import Pair
from mergekit_lfm.artifacts.transform import Element, Transform
from mergekit_lfm.methods.kinds import AlignMethod
from mergekit_lfm.methods.method import Value


@dataclass(frozen=True)
class AlignProblem:
    """A pair of models, and how to align one to the other.

    options: all parameters of the method. initial: the transform to start from. order: the groups of each sweep, by
    name; None for random orders. moments: of both models on the same data. tick: called with 1 after each group.
    """

    pair: Pair
    options: Mapping[str, Value]
    initial: Transform | None = None
    order: Sequence[Sequence[str]] | None = None
    moments: Moments | None = None
    tick: Callable[[int], None] = lambda _: None

    @property
    def start(self) -> Mapping[str, Element]:
        """The elements to start from; groups without one start from the identity."""
        return {} if self.initial is None else self.initial.elements

    def number(self, name: str) -> float:
        """The value of a numeric parameter."""
        value = self.options[name]
        assert isinstance(value, int | float)
        return value


@dataclass(frozen=True)
class AlignResult:
    """The result of an aligner: an element for every group that it rewrites, in a pair whose gains may be folded.

    exact: True if the model's outputs stay the same. heeded: which of "order" and "initial" affect the result if given.
    """

    pair: Pair
    elements: Mapping[str, Element]
    exact: bool = True
    heeded: frozenset[str] = frozenset()


Aligner = AlignMethod[Callable[[AlignProblem], AlignResult]]
