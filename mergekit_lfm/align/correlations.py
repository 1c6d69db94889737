"""Second moments of the inputs of both models' layers on the same data, in blocks for the groups that they read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mergekit_lfm.align.pair import Pair
from mergekit_lfm.arch.table import Part, part_size
from mergekit_lfm.artifacts.statistics import Statistics, open_statistics
from mergekit_lfm.errors import FormatError, PlanError

Triple = tuple[Tensor, Tensor, Tensor]  # cross [in + 1, in + 1], and both models' mean squares [in + 1]
MomentsSource = Statistics | str | Path | Mapping[str, Triple]

READERS = ("'", "output")  # views in which a layer reads a group
VARIANCE_RESOLUTION = 1e-6  # of the mean square: a variance below it is rounding in float32


@dataclass(frozen=True)
class Moment:
    """The moments of one layer's inputs in both models.

    weight: its tensor; read: returns the cross moments [m + 1, n + 1] of `to` with the source, and the mean squares of
    each.
    """

    weight: str
    read: Callable[[], Triple]


@dataclass(frozen=True)
class UnitMoments:
    """The moments of the units in a part of a layer's inputs, float64.

    cross [m, n]: E x y^T; mean and power: the means and mean squares of x [m], from `to`, and y [n], from the source.
    each: entries per unit.
    """

    part: Part
    each: int
    cross: Tensor
    mean: tuple[Tensor, Tensor]
    power: tuple[Tensor, Tensor]

    def correlation(self) -> Tensor:
        """Pearson's correlations, [units, units]; 0 for a constant unit; the sum over a unit's entries."""
        covariance = self.cross - self.mean[0][:, None] * self.mean[1]
        inverse = [
            torch.where(p - m.square() > VARIANCE_RESOLUTION * p, p - m.square(), torch.inf).rsqrt()
            for m, p in zip(self.mean, self.power, strict=True)
        ]
        return self.by_unit(covariance * inverse[0][:, None] * inverse[1])

    def product(self, gains: tuple[Tensor, Tensor] | None = None, size: int | None = None) -> Tensor:
        """E x y^T [units, units], divided by the root mean squares of x and y.

        gains: x and y are first divided by these, except that entries with gain 0 become 0. size: each run of so many
        units has its own root mean square; by default all units share one.
        """
        factors = []
        for i, power in enumerate(self.power):
            inverse = torch.ones_like(power) if gains is None else _inverse(gains[i].double())
            total = (power * inverse.square()).view(-1, size or len(power)).sum(1)
            root = torch.where(total > 0, total, torch.inf).rsqrt().repeat_interleave(size or len(power))
            factors.append(inverse * root)
        return self.by_unit(self.cross * factors[0][:, None] * factors[1])

    def squares(self) -> tuple[Tensor, Tensor, Tensor]:
        """E x y^T, E x^2 and E y^2 of the units, summed over each unit's entries."""
        first, second = (p.view(-1, self.each).sum(1) for p in self.power)
        return self.by_unit(self.cross), first, second

    def by_unit(self, c: Tensor) -> Tensor:
        """c summed over the entries of each unit: entry i of one with entry i of the other."""
        m, n = (size // self.each for size in c.shape)
        return c.view(m, self.each, n, self.each).diagonal(dim1=1, dim2=3).sum(-1)


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x == 0, torch.zeros_like(x), 1 / torch.where(x == 0, 1.0, x))


@dataclass(frozen=True)
class Moments:
    """The moments of all covered layers, one for all layers with the same inputs."""

    found: Sequence[Moment]
    label: str

    def of(self, pair: Pair, group: str) -> list[UnitMoments]:
        """A block for every part of the group that a covered layer reads. Raises FormatError for NaN or infinity."""
        blocks = []
        for moment in self.found:
            parts = pair.symmetries.tensors[moment.weight][reading_axis(pair, moment.weight)]
            if any(part.group == group for part in parts):
                blocks += [block for block in self._blocks(pair, moment) if block.part.group == group]
        return blocks

    def require(self, pair: Pair, groups: Mapping[str, object]) -> None:
        """Raises PlanError with all of these groups that no covered layer reads."""
        lacking = [group for group in groups if pair.uses(group) and not self._covered(pair, group)]
        if lacking:
            raise PlanError(
                f"{self.label} has no moments for {', '.join(lacking)}: no linear layer in it reads these units. "
                "Collect cross moments of all layers; if only other layers, such as convolutions, read them, use "
                "weight_matching"
            )

    def _covered(self, pair: Pair, group: str) -> bool:
        axes = (pair.symmetries.tensors[m.weight][reading_axis(pair, m.weight)] for m in self.found)
        return any(part.group == group for axis in axes for part in axis)

    def _read(self, moment: Moment) -> Triple:
        """The moments of a layer, float64. Raises FormatError for NaN or infinity."""
        cross, first, second = (x.double() for x in moment.read())
        if not all(bool(x.isfinite().all()) for x in (cross, first, second)):
            raise FormatError(
                f"{self.label}: the moments of {moment.weight} hold NaN or infinity, expected finite numbers; collect "
                "them again, on inputs that keep both models' activations finite"
            )
        return cross, first, second

    def _blocks(self, pair: Pair, moment: Moment) -> list[UnitMoments]:
        cross, first, second = self._read(moment)
        axis = reading_axis(pair, moment.weight)
        tables = (pair.to_symmetries, pair.symmetries)
        sizes = [side.specs[moment.weight].shape[axis] for side in (pair.to, pair.source)]
        expected = [(sizes[0] + 1, sizes[1] + 1), (sizes[0] + 1,), (sizes[1] + 1,)]
        if [tuple(x.shape) for x in (cross, first, second)] != expected:
            raise PlanError(
                f"{self.label}: the moments of {moment.weight} are {[tuple(x.shape) for x in (cross, first, second)]}, "
                f"expected {expected}: the inputs of both models and a 1; collect them on these models"
            )
        runs = zip(*(s.lengths(moment.weight, axis, n) for s, n in zip(tables, sizes, strict=True)), strict=True)
        blocks, at = [], [0, 0]
        for part, run in zip(pair.symmetries.tensors[moment.weight][axis], runs, strict=True):
            i, j = (slice(a, a + n) for a, n in zip(at, run, strict=True))
            each = run[1] // part_size(pair.symmetries.groups, part) if part.group else 1
            means, powers = (cross[:-1, -1][i], cross[-1, :-1][j]), (first[:-1][i], second[:-1][j])
            blocks.append(UnitMoments(part, each, cross[:-1, :-1][i, j], means, powers))
            at = [a + n for a, n in zip(at, run, strict=True)]
        return blocks


def reading_axis(pair: Pair, weight: str) -> int:
    """The axis of a layer's inputs: the first that reads a group, else the last."""
    axes = pair.symmetries.tensors[weight]
    reading = [i for i, parts in enumerate(axes) if any(part.view in READERS for part in parts)]
    return reading[0] if reading else len(axes) - 1


def open_moments(given: MomentsSource, pair: Pair, contents: Callable[[], tuple[str, str]]) -> Moments:
    """The cross moments in a file or a mapping from weights to `Triple`s, with `to` first.

    contents: returns the digests of the source and of `to`; a file may hold the two models in either order. Raises
    PlanError for statistics of other models or of another kind, for tensors that are not in the table, and for anything
    but a file or a mapping of triples.
    """
    if isinstance(given, Mapping):
        return _of_mapping(given, pair)
    if not isinstance(given, Statistics | str | os.PathLike):
        raise PlanError(
            f"statistics: found a {type(given).__name__}, expected a file of cross moments, or a mapping from weights "
            "to their moments"
        )
    statistics = given if isinstance(given, Statistics) else open_statistics(Path(given))
    facts, (source, to) = statistics.info, contents()
    if facts.kind != "cross":
        raise PlanError(
            f"{statistics.path} holds {facts.kind} statistics, expected cross moments of both models; collect them "
            "with `mergekit-lfm stats cross A B --data FILE ...`"
        )
    if facts.models not in ((to, source), (source, to)):
        raise PlanError(
            f"{statistics.path} is of the models {' and '.join(facts.models)}, expected {to} ({pair.to.label}) and "
            f"{source} ({pair.source.label}); collect cross moments of these two with `mergekit-lfm stats cross`"
        )
    swapped = facts.models != (to, source)
    entries: dict[str, Moment] = {}
    for layer in facts.layers.values():
        if layer.entry not in entries and layer.weight in pair.symmetries.tensors:
            entries[layer.entry] = _from_file(statistics, layer.weight, layer.entry, swapped)
    return Moments(list(entries.values()), str(statistics.path))


def _of_mapping(given: Mapping[str, Triple], pair: Pair) -> Moments:
    """The moments in a mapping. Raises PlanError with all wrong names, or all wrong values."""
    if unknown := sorted(str(name) for name in given if name not in pair.symmetries.tensors):
        raise PlanError(f"the statistics name {', '.join(unknown)}, which the table lacks; name weights of layers")
    if vectors := [name for name in given if len(pair.symmetries.tensors[name]) < 2]:
        raise PlanError(f"the statistics name {', '.join(vectors)}, expected weights of layers; name only those")
    wrong = [
        name
        for name, triple in given.items()
        if not isinstance(triple, Sequence) or len(triple) != 3 or not all(isinstance(x, Tensor) for x in triple)
    ]
    if wrong:
        raise PlanError(
            f"the statistics of {', '.join(wrong)} are not three tensors; expected for each weight the cross moments, "
            "the mean squares of the model to align to, and those of the source"
        )
    return Moments([_from_triple(name, triple) for name, triple in given.items()], "the mapping of statistics")


def _from_triple(name: str, triple: Triple) -> Moment:
    return Moment(name, lambda: triple)


def _from_file(statistics: Statistics, weight: str, entry: str, swapped: bool) -> Moment:
    def read() -> Triple:
        names = (f"cross/{entry}", f"power/first/{entry}", f"power/second/{entry}")
        cross, first, second = (statistics.tensors.read(n).view(statistics.tensors[n].shape) for n in names)
        return (cross.T, second, first) if swapped else (cross, first, second)

    return Moment(weight, read)
