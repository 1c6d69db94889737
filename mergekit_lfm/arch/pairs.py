"""Check that two models fit one table, so that one can be aligned to the other."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_lfm.arch.table import Symmetries, Units, check_fit, part_size
from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.tensors import TensorSpec

Specs = Mapping[str, TensorSpec]


def check_alike(
    specs: tuple[Specs, Specs],
    tables: tuple[Symmetries, Symmetries],
    labels: tuple[object, object],
    *,
    widths: bool,
) -> None:
    """Raises PlanError if a model does not fit its table, or if the two models differ too much.

    widths: True if groups of units may differ in size.
    """
    for tensors, table, label in zip(specs, tables, labels, strict=True):
        check_fit(table, tensors, label)
    first, second = tables
    problems = [f"{name} is in one table only" for name in sorted(first.tensors.keys() ^ second.tensors.keys())]
    both = [name for name in first.tensors if name in second.tensors]
    problems += [f"{name} has other axes" for name in both if first.tensors[name] != second.tensors[name]]
    for name in sorted(first.groups.keys() | second.groups.keys()):
        one, two = first.groups.get(name), second.groups.get(name)
        units = isinstance(one, Units) and isinstance(two, Units)
        if one != two and not (widths and units):
            problems.append(f"group {name}: {one} and {two}")
    problems = problems or [
        f"{specs[0][name]} and {list(specs[1][name].shape)}" for name in both if not _alike(name, specs, tables)
    ]
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        wider = "" if widths else "; `ot` allows other numbers of hidden units"
        raise PlanError(
            f"{labels[0]} and {labels[1]} differ in shape:\n  " + "\n  ".join(shown) + "\nExpected models of "
            f"one architecture and size{wider}"
        )


def _alike(name: str, specs: tuple[Specs, Specs], tables: tuple[Symmetries, Symmetries]) -> bool:
    """True if a tensor has the same number of entries per unit, along every axis, in both models."""
    both = zip(specs, tables, strict=True)
    first, second = ([_each(table, name, i, n) for i, n in enumerate(tensors[name].shape)] for tensors, table in both)
    return first == second


def _each(table: Symmetries, name: str, axis: int, size: int) -> int:
    """The entries per unit on an axis of this size; all entries of a free axis."""
    parts = table.tensors[name][axis]
    acted_on = [part for part in parts if part.group is not None]
    return size // sum(part_size(table.groups, part) for part in acted_on) if acted_on else size
