"""How large the changes of a patch are beside the tensors that they change, and how much of them rounding leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lfm.artifacts.patch import Patch
    from mergekit_lfm.store.checkpoint import Checkpoint

# A change smaller than this, relative to its tensor, loses part of its effect if the sum is stored in 16 bits.
ROUNDS_AWAY = 5e-3
HALVES = ("bfloat16", "float16")


def changes_data(patch: Patch, source: Checkpoint | None = None) -> list[dict[str, Any]]:
    """The kind, size and Frobenius norm of the change of each tensor that a patch changes.

    With the model also the norm relative to the tensor's (`relative`), the factor by which the tensor's norm grows
    (`growth`), and the share of the change left after rounding the sum to the tensor's dtype (`kept`: the difference
    of rounded sum and tensor, projected on the change; 1 without rounding).
    """
    rows = []
    for name, was in patch.info.tensors.items():
        parts = patch.parts(name)
        row: dict[str, Any] = {
            "name": name,
            "kind": was.kind,
            "shape": list(was.shape),
            "dtype": was.dtype,
            "rank": parts[0].shape[1] if was.kind == "low_rank" else None,
            "bytes": sum(x.nbytes for x in parts),
        }
        if was.kind != "replace":
            change = patch.change(name)
            row["norm"] = _norm(change)
            if source is not None:
                row |= _effect(source.read(name).view(was.shape), change)
        rows.append(row)
    return rows


def _effect(weight: Tensor, change: Tensor) -> dict[str, float | None]:
    """The change relative to its weight, and the share that rounding leaves. None for a ratio to zero."""
    before, size = _norm(weight), _norm(change)
    after = (weight.double() + change.double()).to(weight.dtype).double()
    moved = float(((after - weight.double()) * change.double()).sum())
    return {
        "relative": size / before if before else None,
        "growth": _norm(after) / before if before else None,
        "kept": moved / size**2 if size else None,
    }


def _norm(x: Tensor) -> float:
    return float(x.double().norm())


def rounding_warnings(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line if some changes are so small that rounding to 16 bits loses part of them; else []."""
    small = [
        row
        for row in changes
        if row["dtype"] in HALVES and row.get("relative") is not None and row["relative"] < ROUNDS_AWAY
    ]
    if not small:
        return []
    worst = min(small, key=lambda row: row["kept"] if row["kept"] is not None else 1.0)
    lost = "" if worst["kept"] is None else f"; {worst['name']} keeps {worst['kept']:.0%} of its change"
    count = f"{len(small):,} change{'' if len(small) == 1 else 's'}"
    return [
        f"{count} of {worst['dtype']} tensors are smaller than {ROUNDS_AWAY:.1%} of them, and rounding loses part of "
        f"it{lost}"
    ]
