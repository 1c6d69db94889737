"""Which hidden units of MLPs stay in a narrower model: those of the largest importance, from weights or activations.

By weights, a unit's importance is the product of the Euclidean norms of its weights in each linear layer of the MLP,
the bias with the weights: of the layers that write it (two, in a gated MLP) and the one that reads it. Factors that a
symmetry of the model moves from one of these layers to another change nothing. With Gram matrices it is the root mean
square of what the unit adds to the MLP's output. Everything is float64; equal units stay by the lowest index.
Source: norms of filters after Li et al. 2017, arXiv 1608.08710 (there L1, of the incoming weights alone); norms of
activations times those of weights after Sun et al. 2024, Wanda, arXiv 2306.11695, for whole units.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_lfm.artifacts.statistics import Statistics
from mergekit_lfm.plan.student import Mlps
from mergekit_lfm.store.checkpoint import Checkpoint

if TYPE_CHECKING:
    from numpy.typing import NDArray

AT_ONCE = 1 << 22  # elements of a tensor in memory


def choose_units(
    source: Checkpoint, mlps: Mlps, statistics: Statistics | None, used: Collection[str]
) -> dict[str, list[int]]:
    """The units of each MLP that stay, in their order. used: names of tensors; an MLP without any is not looked at."""
    chosen = dict[str, list[int]]()
    for group in mlps.groups:
        if not any(name in used for name, _ in mlps.symmetries.uses(group)):
            chosen[group] = [*range(mlps.kept)]
            continue
        worth = by_weights(source, mlps, group) if statistics is None else by_inputs(source, mlps, group, statistics)
        chosen[group] = sorted(np.argsort(-worth, kind="stable")[: mlps.kept].tolist())
    return chosen


def by_weights(source: Checkpoint, mlps: Mlps, group: str) -> NDArray[np.float64]:
    """The importance of each unit by its weights, [units]."""
    squares = dict[tuple[str, int, int], Any]()  # by layer, and the run of its axis: gate and up may share a tensor
    symmetries = mlps.symmetries
    for name, axis in symmetries.uses(group):
        sums, first = _square_sums(source, name, axis), 0
        parts = symmetries.tensors[name][axis]
        for i, (part, size) in enumerate(zip(parts, symmetries.lengths(name, axis, len(sums)), strict=True)):
            if part.group == group:
                key = name.rpartition(".")[0], i, part.view == "'"
                own = sums[first : first + size].reshape(mlps.of, -1).sum(1)
                squares[key] = squares.get(key, 0) + own
            first += size
    importance: NDArray[np.float64] = np.prod([np.sqrt(each) for each in squares.values()], axis=0)
    return importance


def by_inputs(source: Checkpoint, mlps: Mlps, group: str, statistics: Statistics) -> NDArray[np.float64]:
    """The root mean square of each unit's share in the MLP's output, [units]."""
    ((name, axis),) = mlps.readers(group)
    layer, _ = statistics.by_weight[name]
    entry, side = statistics.entry(layer), mlps.of + 2  # from one entry of the diagonal to the next; a 1 is appended
    squares = [float(statistics.tensors.read(entry, i * side, i * side + 1)) for i in range(mlps.of)]
    return np.sqrt(np.array(squares, dtype=np.float64) * _square_sums(source, name, axis))


def _square_sums(source: Checkpoint, name: str, axis: int) -> NDArray[np.float64]:
    """The sum of squares of each entry along an axis. numpy adds in one order, whatever the number of threads."""
    spec = source[name]
    rows, width = spec.shape[0], spec.numel // spec.shape[0]
    step = max(1, AT_ONCE // width)
    total = np.zeros(spec.shape[axis])
    for first in range(0, rows, step):
        last = min(rows, first + step)
        block = source.read(name, first * width, last * width).double().numpy().reshape(last - first, width)
        if axis == 0:
            total[first:last] = np.square(block).sum(1)
        else:
            total += np.square(block).sum(0)
    return total
