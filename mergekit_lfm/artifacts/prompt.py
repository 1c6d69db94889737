"""The prompt as PEFT saves it: vectors that stand before every text, or keys and values before those of attention.

It is a folder like an adapter's, and changes no weight of the model that it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lfm.artifacts.adapter import open_adapter
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.output.lock import ADAPTER_LOCK, lock_of
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tensors import FLOATS

if TYPE_CHECKING:
    from torch import Tensor

VALUES = "prompt_embeddings"  # PEFT's name of the tensor
PREFIX = "PREFIX_TUNING"
SOFT = ("PROMPT_TUNING", "P_TUNING")  # vectors in place of a text's first embeddings


@dataclass(frozen=True)
class Prompt:
    """A prompt in a folder: its label in messages, PEFT's config, and its tensors.

    base: the content digest of the model that it was trained on, None if no lock says so.
    """

    label: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Checkpoint
    base: str | None = None

    @property
    def kind(self) -> str:
        """PEFT's name of its kind."""
        return str(self.config["peft_type"])

    @property
    def count(self) -> int:
        """The number of its virtual tokens."""
        return self.tensors[VALUES].shape[0]

    @property
    def width(self) -> int:
        """The numbers of each virtual token."""
        return self.tensors[VALUES].shape[1]

    def read(self) -> Tensor:
        """Its values, [count, width]."""
        return self.tensors.read(VALUES).view(self.tensors[VALUES].shape)


def open_prompt(folder: Path, label: str | None = None) -> Prompt:
    """The prompt in a folder. Raises PlanError for an adapter of another kind, FormatError for a damaged folder."""
    label = str(folder) if label is None else label
    if not folder.is_dir():
        raise PlanError(
            f"{label} is not a folder; expected a prompt's, as `mergekit-lfm tune --method prompt` makes it"
        )
    adapter = open_adapter(folder, label)
    if adapter.kind not in (PREFIX, *SOFT):
        raise PlanError(f"{label} is {adapter.kind}, expected a prompt; name an adapter as MODEL+{label}")
    spec = adapter.tensors.get(VALUES)
    if spec is None or len(spec.shape) != 2 or spec.dtype not in FLOATS:
        raise FormatError(
            f"{label}: found {spec or 'no tensor ' + VALUES}, expected {VALUES} [tokens, width]; save it anew"
        )
    stated = adapter.config.get("num_virtual_tokens")
    if stated != spec.shape[0] or adapter.config.get("num_transformer_submodules") not in (1, None):
        found = f"{stated} tokens for {adapter.config.get('num_transformer_submodules')} parts of a model"
        raise FormatError(f"{label}: its config says {found}, its tensor has {spec.shape[0]} for one; save it anew")
    inputs = (lock_of(folder, ADAPTER_LOCK) or {}).get("inputs") or [{}]
    return Prompt(label, folder, adapter.config, adapter.tensors, inputs[0].get("content"))
