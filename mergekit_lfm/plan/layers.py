"""Which layer a tensor is in, by the numbers in the names: for gradients over the layers, and for stacks of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # between two dots, or at an end


@dataclass(frozen=True, slots=True)
class Place:
    """The layer of a tensor: what its name has before and behind the layer's number, that, and the number of layers."""

    before: str
    index: int
    behind: str
    count: int

    @property
    def layer(self) -> tuple[int, int]:
        """The index and the count."""
        return self.index, self.count

    def named(self, index: int) -> str:
        """The tensor's name in another layer."""
        return f"{self.before}{index}{self.behind}"


def find_layers(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(layer index, layer count) of each tensor in a layer."""
    return {name: place.layer for name, place in find_places(names).items()}


def find_places(names: Iterable[str]) -> dict[str, Place]:
    """The layer of each tensor in one.

    Names that differ only by numbers have one pattern. Of the numbers in a name that one is the layer that takes the
    most values among names of one pattern (the mean over all patterns with a number there); among equals the first, but
    one that begins the name comes last. So the index of a container, as in `0.auto_model.encoder.layer.11`, does not
    count, nor does one inside a layer. Experts do not count either: there may be more of them than of layers. Layers
    are counted for each text before their number. Tensors beside the layers of a container are in no layer.
    """
    numbers = {name: [match for match in _NUMBER.finditer(name) if not _counts_experts(match)] for name in names}
    places = {name: [_pattern(name[: match.start()]) for match in found] for name, found in numbers.items()}
    values: dict[str, dict[str, set[str]]] = {}  # by place and pattern
    for name, found in numbers.items():
        for place, match in zip(places[name], found, strict=True):
            values.setdefault(place, {}).setdefault(_pattern(name), set()).add(match[0])
    sizes = {place: fmean(map(len, patterns.values())) for place, patterns in values.items()}
    chosen = {
        name: max(range(len(at)), key=lambda i: (sizes[at[i]], at[i] != "", -i)) for name, at in places.items() if at
    }
    containers = {place for name, i in chosen.items() for place in places[name][:i]}
    layers = {name: numbers[name][i] for name, i in chosen.items() if places[name][i] not in containers}
    counts: dict[str, int] = {}
    for name, match in layers.items():
        before = name[: match.start()]
        counts[before] = max(counts.get(before, 0), int(match[0]) + 1)
    return {
        name: Place(before := name[: match.start()], int(match[0]), name[match.end() :], counts[before])
        for name, match in layers.items()
    }


def _counts_experts(match: re.Match[str]) -> bool:
    """True for the number after a word such as `experts`."""
    return match.string[: match.start()].rstrip(".").endswith(("expert", "experts"))


def _pattern(name: str) -> str:
    """The name without its numbers."""
    return _NUMBER.sub("#", name)
