"""A file of tensors whose new values are still to be computed: names, shapes and costs for the plan."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_lfm.store.formats import WeightFile
from mergekit_lfm.store.tensors import TensorSpec


class PendingFile(WeightFile):
    """A file with the shapes of tensors that an alignment or edit will rewrite, and the most memory this will take.

    specs: the new shapes. scratch: bytes for each tensor in every thread; resident: bytes as long as the merge runs.
    """

    def __init__(
        self, inner: WeightFile, specs: Mapping[str, TensorSpec], scratch: Mapping[str, int], resident: int
    ) -> None:
        self.inner, self.path = inner, inner.path
        self.data_start, self.fallback = inner.data_start, inner.fallback
        self.nbytes, self.stamp, self.snapshot = inner.nbytes, inner.stamp, inner.snapshot
        self.tensors = {name: (specs[name], offset) for name, (_, offset) in inner.tensors.items()}
        self._scratch, self._resident = scratch, resident

    @property
    def resident(self) -> int:
        return self._resident

    def scratch(self, name: str) -> int:
        return self._scratch[name]

    def read_into(self, name: str, start: int, into: memoryview) -> None:  # noqa: ARG002
        raise AssertionError(f"{name} was read before its alignment or edit was made")
