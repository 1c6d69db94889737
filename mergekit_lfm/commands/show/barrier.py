"""Show lines between models, and repairs."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mergekit_lfm.commands.show.terminal import count_noun, table
from mergekit_lfm.machine.text import printable_line

if TYPE_CHECKING:
    from mergekit_lfm.judge.barrier import Barrier, Interpolation
    from mergekit_lfm.repair import Repaired


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _barrier(barrier: Barrier) -> dict[str, float | None]:
    return {"barrier": _finite(barrier.height), "t": barrier.t}


def line_data(line: Interpolation) -> dict[str, Any]:
    """The line for JSON, which has null for infinity and NaN."""
    return {
        "predictions": line.predictions,
        "points": [{name: _finite(x) for name, x in asdict(point).items()} for point in line.points],
        "loss": _barrier(line.loss_barrier),
        "accuracy": _barrier(line.accuracy_barrier),
    }


def line_text(line: Interpolation) -> str:
    """The line as a table with a row for each point, and both barriers."""
    rows = [("t", "loss", "accuracy")]
    rows += [(f"{point.t:.3g}", f"{point.loss:.4f}", f"{point.accuracy:.4f}") for point in line.points]
    barriers = (
        f"barrier of the {name}: {barrier.height:.4f}" + (f" at t = {barrier.t:.3g}" if barrier.height > 0 else "")
        for name, barrier in (("loss", line.loss_barrier), ("accuracy", line.accuracy_barrier))
    )
    return "\n".join(
        [table(rows, right="t loss accuracy"), f"over {count_noun(line.predictions, 'prediction')}", *barriers]
    )


def repaired_data(repaired: Repaired) -> dict[str, Any]:
    """The result of a repair for JSON."""
    return asdict(repaired)


def repaired_text(repaired: Repaired) -> str:
    """The result of a repair as a table of the repaired layers, and a line for each layer left alone."""
    lines = []
    if repaired.layers:
        rows = [("layer", "units", "spread before", "shift before")]
        rows += [(x.name, f"{x.units:,}", f"{x.spread:.1%}", f"{x.shift:.1%}") for x in repaired.layers]
        lines.append(table(rows, right="units"))
    if repaired.batchnorms:
        lines.append(f"re-estimated: {count_noun(len(repaired.batchnorms), 'BatchNorm layer')}")
    return "\n".join(
        [*lines, *(printable_line(f"left alone: {name}: {reason}") for name, reason in repaired.left.items())]
    )
