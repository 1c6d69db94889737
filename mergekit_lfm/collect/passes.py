"""Passes over the data: as many units at a time as fit in memory; interrupted passes resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mergekit_lfm.collect.partial import Partial
from mergekit_lfm.collect.request import Statistic, StatisticsRequest
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.machine.pauses import Pauses, delay_interrupts
from mergekit_lfm.machine.progress import Count
from mergekit_lfm.machine.sizes import format_size
from mergekit_lfm.store.tensors import ITEMSIZE, TensorSpec


def divide(statistic: Statistic, memory: int, done: Mapping[str, object]) -> list[list[str]]:
    """Units not done yet, in passes whose sums fit the memory. Raises PlanError if a single unit does not fit."""
    sizes = {unit: sum_bytes(shapes) for unit, shapes in statistic.units.items()}
    too_large = [f"{unit}: {format_size(nbytes)}" for unit, nbytes in sizes.items() if nbytes > memory]
    if too_large:
        raise PlanError(
            f"found a memory of {format_size(memory)}, expected room for the sums of any one of\n  "
            + "\n  ".join(too_large)
            + "\nGive more memory, or leave these out (`layers`)"
        )
    passes: list[list[str]] = []
    room = 0
    for unit in (unit for unit in statistic.units if unit not in done):
        if sizes[unit] > room:
            passes.append([])
            room = memory
        passes[-1].append(unit)
        room -= sizes[unit]
    return passes


def sum_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of memory for the sums of a unit."""
    return sum(TensorSpec(name, shape, "float64").nbytes for name, shape in shapes.items())


def file_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of a unit in the file."""
    return sum_bytes(shapes) // ITEMSIZE["float64"] * ITEMSIZE["float32"]


def run_passes(
    statistic: Statistic,
    request: StatisticsRequest,
    passes: list[list[str]],
    partial: Partial,
    pauses: Pauses,
    tell: Count,
) -> None:
    """Collect the units of all passes into `partial`, and its sums at the pauses.

    Calls tell(examples done, total) after every batch.
    """
    examples = request.examples
    for number, units in enumerate(passes):
        shapes = {name: shape for unit in units for name, shape in statistic.units[unit].items()}
        device = request.subjects[0].device
        sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}

        def report(seen: int, before: int = number * examples) -> None:
            tell(before + seen, len(passes) * examples)

        _add_batches(statistic, request, sums, partial, pauses, report)
        entries: dict[str, Tensor] = {}
        done: dict[str, dict[str, Any]] = {}
        for unit in units:
            tensors, count = statistic.finish(unit, sums)
            stored = {name: entry.float() for name, entry in tensors.items()}
            _check_finite(stored, examples)
            squares = sum(float(entry.double().square().sum()) for entry in stored.values())
            entries |= stored
            done[unit] = {"count": count, "squares": squares}
            for name in tensors:
                del sums[name]
        partial.write(entries, done)


def _add_batches(
    statistic: Statistic,
    request: StatisticsRequest,
    sums: dict[str, Tensor],
    partial: Partial,
    pauses: Pauses,
    report: Callable[[int], None],
) -> None:
    """Add all batches to the sums, starting after those in the saved sums."""
    start = partial.load_sums(sums)
    seen = sum(len(batch) for batch in islice(request.data, start))
    with delay_interrupts() as interrupted:
        for number, batch in enumerate(request.data):
            if number < start:
                continue
            statistic.add(batch, sums)
            seen += len(batch)
            if number == start:
                _check_finite(sums, seen)  # early: a broken model shows on the first batch
            report(seen)
            if pauses.due or interrupted():
                with pauses.taken():
                    partial.save_sums(sums, number + 1)
            if interrupted():
                raise KeyboardInterrupt


def _check_finite(entries: Mapping[str, Tensor], examples: int) -> None:
    broken = [name for name, entry in entries.items() if not bool(torch.isfinite(entry).all())]
    if broken:
        raise FormatError(
            f"{', '.join(broken)}: NaN or infinite after {examples} examples, expected finite numbers. Check the model "
            "and the data; a larger dtype helps where float16 overflows"
        )
