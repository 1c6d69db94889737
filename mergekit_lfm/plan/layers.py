"""Which layer a tensor is in, by the numbers in the names: for gradients over the layers, and for stacks of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

_NUMBER = re.compile(r"(?<![^.])(\d+)(?![^.])")  # between two dots, or at an end


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
    forms: dict[tuple[str, ...], list[list[str]]] = {}  # names in parts, by the texts between their numbers
    for parts in map(_NUMBER.split, names):
        forms.setdefault(tuple(parts[::2]), []).append(parts)
    places = {form: _places(form) for form in forms}
    values: dict[str, dict[str, set[str]]] = {}  # by place and pattern
    for form, alike in forms.items():
        for i, place in places[form].items():
            numbers = values.setdefault(place, {}).setdefault("#".join(form), set())
            numbers.update([parts[i] for parts in alike])
    sizes = {place: fmean(map(len, patterns.values())) for place, patterns in values.items()}
    chosen = {form: max(at, key=lambda i: (sizes[at[i]], at[i] != "", -i)) for form, at in places.items() if at}
    containers = {place for form, layer in chosen.items() for i, place in places[form].items() if i < layer}
    layers: dict[str, tuple[str, int, str]] = {}  # the text before the number, the number, the text behind it
    counts: dict[str, int] = {}
    for form, i in chosen.items():
        for parts in forms[form] if places[form][i] not in containers else ():
            before, index = "".join(parts[:i]), int(parts[i])
            layers["".join(parts)] = before, index, "".join(parts[i + 1 :])
            counts[before] = max(counts.get(before, 0), index + 1)
    return {name: Place(before, index, behind, counts[before]) for name, (before, index, behind) in layers.items()}


def _places(form: tuple[str, ...]) -> dict[int, str]:
    """The pattern of the text before each number of a name, by the number's index among the parts; not of experts'."""
    found = {2 * i - 1: "#".join(form[:i]) for i in range(1, len(form))}
    return {i: place for i, place in found.items() if not place.rstrip(".").endswith(("expert", "experts"))}
