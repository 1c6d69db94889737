"""A checkpoint whose new values are still to be computed: names, shapes and costs for the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.views.base import ReadRows, Source, View, row_count

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Later:
    """Stands for what will make a tensor."""

    spec: TensorSpec
    scratch: int
    whole: bool = False

    @property
    def sources(self) -> tuple[Source, ...]:
        return ((0, self.spec.name),)

    @property
    def panels(self) -> tuple[tuple[int, int], ...]:
        return ((0, row_count(self.spec)),)

    def rows(self, first: int, last: int, read: ReadRows) -> Tensor:  # noqa: ARG002
        raise AssertionError(f"{self.spec.name} was read before its alignment or edit was made")


@final
class Pending(View):
    """The shapes of tensors that an alignment or edit will rewrite, and the most memory this will take.

    specs: the new shapes. scratch: bytes for each tensor in every thread; resident: bytes as long as the merge runs.
    """

    def __init__(
        self,
        inner: Checkpoint,
        specs: Mapping[str, TensorSpec],
        scratch: Mapping[str, int],
        resident: int,
        key: Mapping[str, Any],
    ) -> None:
        super().__init__(specs, (inner,), key)
        self._scratch, self._resident = scratch, resident

    @property
    def held(self) -> int:
        return self._resident

    def maker(self, name: str) -> _Later:
        return _Later(self[name], self._scratch[name])

    def on_device(self, kind: str) -> Pending:
        """The same, to be computed on a kind of device, which is part of its identity."""
        return Pending(self.inners[0], self._specs, self._scratch, self._resident, {**self.key, "device": kind})
