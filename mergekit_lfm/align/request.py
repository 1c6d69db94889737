"""What an aligner is given and what it returns. An aligner is a function from a `Request` to a `Found`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mergekit_lfm.align.correlations import Moments
from mergekit_lfm.align.pair import Pair
from mergekit_lfm.artifacts.transform import Element, Transform
from mergekit_lfm.methods.method import Value


@dataclass(frozen=True)
class Request:
    """A pair of models, and how one is to be brought near the other.

    options: all parameters of the method. initial: what to start from. order: the groups of each sweep, by name; None
    for random ones. moments: of both models on the same data. tick: called after groups.
    """

    pair: Pair
    options: Mapping[str, Value]
    initial: Transform | None = None
    order: Sequence[Sequence[str]] | None = None
    moments: Moments | None = None
    tick: Callable[[int], None] = lambda _: None

    @property
    def start(self) -> Mapping[str, Element]:
        """The elements to start from, of groups that are not left alone."""
        return {} if self.initial is None else self.initial.elements

    def number(self, name: str) -> float:
        """A parameter that is a number."""
        value = self.options[name]
        assert isinstance(value, int | float)
        return value


@dataclass(frozen=True)
class Found:
    """What an aligner found: an element for every group that it rewrites, in a pair whose gains may be folded.

    exact: whether the model's outputs stay the same. heeded: what of "order" and "initial" the result depends on, where
    they are given.
    """

    pair: Pair
    elements: Mapping[str, Element]
    exact: bool = True
    heeded: frozenset[str] = frozenset()


Aligner = Callable[[Request], Found]
