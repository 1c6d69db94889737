"""New gains for norms whose inputs are rotated: the readers become diag(1 / new) O diag(old).

The new gain is that of the model to align to, so that the plain mean of both models is the mean of the models with
their gains folded in, as far as the readers' dtypes can hold it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mergekit_lfm.align.pair import Use
from mergekit_lfm.align.request import AlignResult
from mergekit_lfm.artifacts.transform import Gain, Transform, TransformInfo, UnitsElement

ROOM = 2.0**60  # the largest entry that a division may make: its square, and sums of these, stay finite in float32

Reader = tuple[str, str, Tensor]  # the norm that it reads, its dtype, its largest |entry| for every new unit [n]


def new_gains(found: AlignResult) -> dict[str, Gain]:
    """The old and new gain of every norm on a rotated group, by norm; the outputs are the same with any new gain.

    The new gain is that of `to`, rounded to the dtype of the source's gain. A unit gets 1 instead if its readers cannot
    be divided by it: if it is 0, less than 2^-60 or not finite in that dtype; if it is below 1 and an entry would
    exceed half the greatest number of the reader's dtype, or 2^60; or if it is above 1 and all entries of a reader
    would fall below the least normal number of its dtype.
    """
    pair = found.pair
    readers = list(_readers(found)) if pair.gains else []
    gains = {}
    for norm, (new, old) in pair.gains.items():
        new = new.to(getattr(torch, pair.source.specs[pair.gain_names[norm]].dtype)).double()
        size = new.abs()
        fits = new.isfinite() & (size >= 1 / ROOM)
        for _, dtype, largest in (reader for reader in readers if reader[0] == norm):
            info = torch.finfo(getattr(torch, dtype))
            fits &= (size > 1) | (largest <= size * min(info.max / 2, ROOM))
            fits &= (size < 1) | (largest == 0) | (largest >= size * info.tiny)
        gains[norm] = Gain(old.double(), torch.where(fits, new, 1.0))
    return gains


def _readers(found: AlignResult) -> Iterator[Reader]:
    """The readers of rotated groups behind their norms, as they are with new gains of 1."""
    pair = found.pair
    transform = Transform(pair.symmetries, found.elements, TransformInfo("gains"))

    def of(use: tuple[str, Use]) -> list[Reader]:
        group, (name, axis) = use
        element = found.elements.get(group)
        matrix = element.matrix if isinstance(element, UnitsElement) else None
        matrix = None if matrix is None else matrix.to(pair.device, torch.float64)
        seen: dict[str, Tensor] = {}
        for part, _, y in pair.unfolded((name, axis), group, transform, ("'",)):
            if part.norm in pair.gains:
                largest = (y.double() if matrix is None else matrix @ y.double()).abs().amax(1).cpu()
                seen[part.norm] = torch.maximum(seen[part.norm], largest) if part.norm in seen else largest
        return [(norm, pair.source.specs[name].dtype, largest) for norm, largest in seen.items()]

    uses = [(group, use) for group in sorted(pair.folded) for use in pair.uses(group, ("'",))]
    return (reader for readers in pair.in_order(of, uses) for reader in readers)
