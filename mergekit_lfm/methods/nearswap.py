"""Nearswap: follow another model where it is near, and only so far where it is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_lfm.kernels.block import Rows
from mergekit_lfm.kernels.sums import Weights
from mergekit_lfm.methods.method import REQUIRED, Method, Parameter, Unit, immediate

if TYPE_CHECKING:
    import torch


@immediate
def solve(unit: Unit) -> Weights:
    """The threshold t."""
    return Weights([unit.number("t")])


def apply(rows: Rows, _: torch.Tensor | None, local: torch.Tensor) -> torch.Tensor:
    """The other model's elements that are at most t from the base's, else the base's moved by t towards them."""
    import torch

    base, other = rows
    t, change = local[0], other - base
    return torch.where(change.abs() > t, base + change.sign() * t, other)


METHODS = (
    Method(
        name="nearswap",
        source="mergekit's method of this name, there after BlockMerge_Gradient by Alchemonaut and chargoddard",
        summary="the base, each element moved to another model's by at most t",
        parameters=(
            Parameter("t", REQUIRED, per_input=False, minimum=0, absolute=True, doc="largest change of an element"),
        ),
        base="first",
        inputs=(2, 2),
        solve=solve,
        apply=apply,
    ),
)
