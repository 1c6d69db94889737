"""A smaller model that is planned: which layers stay, in which tensors the units of MLPs are, and the config's key.

The units of an MLP are a group of the architecture's symmetry table, which also says by which entry of the config
their number is set: the one that changes the group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_lfm.arch.registry import ARCHITECTURES, find_symmetries
from mergekit_lfm.arch.table import Symmetries, Units
from mergekit_lfm.artifacts.statistics import Statistics
from mergekit_lfm.errors import PlanError, shorten
from mergekit_lfm.plan.stack import find_stack
from mergekit_lfm.store.checkpoint import Checkpoint

KEYS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff")  # of a config, for the number of an MLP's units
UNITS = "ffn."  # how the names of MLPs' groups begin
WITHOUT = {"resnet"}  # tables without MLPs


@dataclass(frozen=True)
class Mlps:
    """The MLPs of a model. of: the units of each; kept: those that stay. key: of the config, for their number."""

    symmetries: Symmetries
    groups: tuple[str, ...]
    kept: int
    of: int
    key: str

    def readers(self, group: str) -> Iterator[tuple[str, int]]:
        """The tensors that read the units of a group, each with the axis along which they run."""
        for name, axis in self.symmetries.uses(group):
            if any(part.group == group and part.view == "'" for part in self.symmetries.tensors[name][axis]):
                yield name, axis


def choose_layers(
    source: Checkpoint, label: str, layers: Sequence[int] | None, keep: float | None
) -> tuple[tuple[int, ...], int]:
    """The layers that stay, and how many there are. keep: a share of them, evenly spaced, in place of their numbers.

    Raises PlanError for a layer that the model lacks, or if it has not one stack of layers.
    """
    count = len(find_stack(source, label).layers)
    if layers is None:
        assert keep is not None
        return tuple(spread(count, max(1, round(keep * count)))), count
    beyond = [layer for layer in layers if layer >= count]
    if beyond:
        sentence = "{place}: found {found}, and {model} has {count} layers; expected numbers from 0 to {last}"
        found = shorten([*map(str, beyond)])
        raise PlanError(sentence, place="layers", found=found, model=label, count=count, last=count - 1)
    return tuple(layers), count


def spread(count: int, kept: int) -> list[int]:
    """So many of a number of layers, evenly spaced from the first to the last; one alone is in the middle."""
    if kept < 2:
        return [(count - 1) // 2] * kept
    return [round(i * (count - 1) / (kept - 1)) for i in range(kept)]


def ranges_of(layers: Sequence[int]) -> list[tuple[int, int]]:
    """Layers in order as ranges of those that follow one another: the first, and the one behind the last."""
    ranges = list[tuple[int, int]]()
    for layer in layers:
        if ranges and ranges[-1][1] == layer:
            ranges[-1] = ranges[-1][0], layer + 1
        else:
            ranges.append((layer, layer + 1))
    return ranges


def find_mlps(source: Checkpoint, label: str, share: float) -> Mlps:
    """The MLPs of a model. share: of the units of each that stay, one at least.

    Raises PlanError for an architecture whose MLPs are not known, and if the config does not say how wide they are.
    """
    config = source.config
    kind = str(config.get("model_type"))
    build = ARCHITECTURES.get(kind)
    symmetries = None if build is None else find_symmetries(source, label)
    groups = [] if symmetries is None else [name for name in symmetries.groups if name.startswith(UNITS)]
    if build is None or symmetries is None or not groups:
        known = ", ".join(sorted(ARCHITECTURES.keys() - WITHOUT))
        raise PlanError(
            "{place}: {model} has model_type {found}, whose MLPs are not known; expected one of {expected}. "
            "Choose layers in place of units",
            place="mlp",
            model=label,
            found=repr(config.get("model_type")),
            expected=known,
        )
    units = symmetries.groups[groups[0]]
    assert isinstance(units, Units)
    kept = max(1, round(share * units.count))
    names = list(source)
    keys = [key for key in KEYS if _width(build({**config, key: units.count + 1}, names), groups[0]) != units.count]
    if len(keys) != 1:
        raise PlanError(f"mlp: {label}: no one entry of the config of {kind} says how wide MLPs are; found {keys}")
    return Mlps(symmetries, tuple(groups), kept, units.count, keys[0])


def _width(symmetries: Symmetries, group: str) -> int:
    units = symmetries.groups[group]
    assert isinstance(units, Units)
    return units.count


def check_statistics(statistics: Statistics, ref: str, source: Checkpoint, label: str, mlps: Mlps) -> None:
    """Raise PlanError unless statistics are Gram matrices of the model's that have the inputs of all down-projections.

    Reads the model once, to know it by its content.
    """
    kind, models = statistics.info.kind, statistics.info.models
    cure = f"collect those of this model with `mergekit-lfm stats gram {label} ...`"
    if kind != "gram":
        sentence = "{place}: {file} holds {found} statistics, expected {expected}; {cure}"
        raise PlanError(sentence, place="stats", file=ref, found=kind, expected="gram", cure=cure)
    if models[0] != source.content:
        sentence = "{place}: {file} was collected on another model, on content {found}; {model} has {expected}; {cure}"
        words = {"found": models[0], "model": label, "expected": source.content, "cure": cure}
        raise PlanError(sentence, place="stats", file=ref, **words)
    readers = [name for group in mlps.groups for name, _ in mlps.readers(group)]
    if lacking := [name for name in readers if name not in statistics.by_weight]:
        raise PlanError(f"stats: {ref} has no inputs of {shorten(lacking)}; {cure}, without --layers")


def narrowed(config: Mapping[str, Any], mlps: Mlps) -> dict[str, Any]:
    """A config for MLPs of the units that stay."""
    return {**config, mlps.key: mlps.kept}
