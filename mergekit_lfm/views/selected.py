"""Some of a checkpoint's tensors, under names of their own: layers with other numbers, a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.views.base import Source, View


@final
class Selected(View):
    """The checkpoint's tensors with these names. names: of each, its name in the checkpoint by the new one."""

    def __init__(self, inner: Checkpoint, names: Mapping[str, str]) -> None:
        self._names = names
        specs = {
            new: inner[old] if new == old else TensorSpec(new, inner[old].shape, inner[old].dtype)
            for new, old in names.items()
        }
        super().__init__(specs, (inner,), {"names": dict(names)})

    def maker(self, name: str) -> None:  # noqa: ARG002
        return None

    def source(self, name: str) -> Source:
        return 0, self._names[name]
