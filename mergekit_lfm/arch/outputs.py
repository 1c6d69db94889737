"""Units that are a model's outputs: if no head reads the last hidden units, no group may act on them."""

from __future__ import annotations

from collections.abc import Collection

from mergekit_lfm.arch.declare import Part, Symmetries

_OUTPUT = Part(None, free="class")


def keep_outputs(symmetries: Symmetries, outputs: Collection[str]) -> Symmetries:
    """The same table without these groups, with the axes on which they acted free."""
    return Symmetries(
        {name: group for name, group in symmetries.groups.items() if name not in outputs},
        {
            tensor: tuple(tuple(_OUTPUT if part.group in outputs else part for part in axis) for axis in axes)
            for tensor, axes in symmetries.tensors.items()
        },
    )
