"""A quantised checkpoint read as float32: what makes its tensors is found by the reader of its format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.views.base import Maker, View


@dataclass(frozen=True, slots=True)
class Quantised:
    """The quantised tensors of a checkpoint. makers: by name. used: the tensors that only they need, and what for.

    key: all in the config that the values depend on.
    """

    makers: Mapping[str, Maker]
    used: Mapping[str, str]
    key: Mapping[str, Any]


@final
class Dequantised(View):
    """The checkpoint with its quantised tensors as float32, without those that only they need, and all others."""

    def __init__(self, inner: Checkpoint, quantised: Quantised) -> None:
        self._makers, self._used = quantised.makers, quantised.used
        specs = {
            name: self._makers[name].spec if name in self._makers else spec
            for name, spec in inner.items()
            if name not in self._used
        }
        super().__init__(specs, (inner,), {"dequantised": dict(quantised.key)})

    def maker(self, name: str) -> Maker | None:
        return self._makers.get(name)

    @property
    def dropped(self) -> dict[str, str]:
        (inner,) = self.inners
        return {**inner.dropped, **{inner.name_in_files(name): why for name, why in self._used.items()}}

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json without the key that says how the tensors are quantised."""
        return {key: value for key, value in super().config.items() if key != "quantization_config"}
