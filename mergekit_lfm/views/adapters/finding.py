"""An adapter and the model that it changes, while its changes are found; problems are collected, for one message."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from mergekit_lfm.artifacts.adapter import Adapter, Module
from mergekit_lfm.recipe.adapters import LARGEST_SHARE
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.views.adapters.names import is_conv1d


@dataclass
class Finding:
    """An adapter, the model that it changes, and the problems so far.

    names: by the adapter's names of the model's tensors, the model's own.
    """

    adapter: Adapter
    model: Mapping[str, TensorSpec]
    model_type: str
    names: Mapping[str, str]
    problems: list[str] = field(default_factory=list)

    def refuse(self, module: Module, text: str) -> None:
        self.problems.append(f"{module.name}: {text}")

    def weight(self, module: Module) -> TensorSpec:
        return self.model[self.names[f"{module.name}.weight"]]

    def rank(self, module: Module, name: str, found: int) -> int:
        """The rank of a module, which its tensors and the config must agree on. name: for the config's patterns."""
        if not self.adapter.config:
            return found
        stated = self.stated_rank(name)
        if stated != found:
            self.refuse(module, f"its tensors have rank {found}, adapter_config.json says {stated}")
        return found

    def stated_rank(self, name: str) -> object:
        """The rank that the config has for a module or a tensor of this name."""
        config = self.adapter.config
        return self.adapter.rank_patterns.value(name, config.get("r"))

    def scale(self, module: Module, name: str, rank: object) -> float:
        """The factor of a module's change: alpha over the rank or, for rsLoRA, over the rank's root."""
        config = self.adapter.config
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            self.refuse(module, f"found {rank!r:.60} as its rank, expected a whole number from 1")
            return 1.0
        if config:
            alpha = self.adapter.alpha_patterns.value(name, config.get("lora_alpha", config.get("alpha")))
        else:
            alpha = self._alpha(module, rank)
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < LARGEST_SHARE:
            self.refuse(module, f"found {alpha!r:.60} as its alpha, expected a number")
            return 1.0
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def _alpha(self, module: Module, rank: int) -> float:
        """The number in a module's tensor `alpha`; the rank without one."""
        spec = module.parts.get("alpha")
        if spec is None:
            return rank
        if spec.numel != 1:
            self.refuse(module, f"its alpha is {list(spec.shape)}, expected a number")
            return rank
        return float(self.adapter.tensors.read(spec.name)[0])

    def is_turned(self, module: Module, weight: TensorSpec, out: int, columns: int) -> bool | None:
        """Whether the model stores a weight as [in, out]; None if it has another shape."""
        stored = (weight.shape[0], weight.numel // max(1, weight.shape[0])) if weight.shape else ()
        if out == columns and stored == (out, out) and len(weight.shape) == 2:
            return is_conv1d(module.name, self.model_type, bool(self.adapter.config.get("fan_in_fan_out")))
        if stored == (out, columns):
            return False
        return True if len(weight.shape) == 2 and stored == (columns, out) else None
