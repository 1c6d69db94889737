"""A model to collect statistics from: how to run it, and which tensor of its checkpoint each parameter is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergekit_lfm.errors import PlanError
from mergekit_lfm.runtime.load import run
from mergekit_lfm.runtime.locate import locate_tensors
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.identity import content_of

if TYPE_CHECKING:
    from mergekit_lfm.runtime.batches import Batch

NO_TENSOR = "the checkpoint has no tensor of its own for it"
SEVERAL = "several tensors of the checkpoint hold the same values"


@dataclass(frozen=True)
class Subject:
    """A model with the digest of its content, and the tensor of each parameter, by the parameter's name.

    unclear: names of parameters that may be any of several tensors.
    """

    module: nn.Module
    digest: str
    tensors: Mapping[str, str]  # a parameter with several names occurs under each
    unclear: frozenset[str] = frozenset()

    @cached_property
    def names(self) -> dict[int, list[str]]:
        """All names of each parameter, by the parameter's id; the first is that of `named_parameters`."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return names

    @cached_property
    def owners(self) -> Counter[int]:
        """How many modules own each parameter directly, by the parameter's id."""
        return Counter(
            key for module in self.module.modules() for key in {id(p) for p in module.parameters(recurse=False)}
        )

    def tensors_of(self, parameter: nn.Parameter) -> list[str]:
        """The tensors of the checkpoint that hold the parameter; several if it is stored more than once."""
        names = self.names.get(id(parameter), ())
        return list(dict.fromkeys(self.tensors[name] for name in names if name in self.tensors))

    def why_unknown(self, parameter: nn.Parameter) -> str:
        """Why no tensor of the checkpoint is known to hold the parameter."""
        return SEVERAL if self.unclear.intersection(self.names.get(id(parameter), ())) else NO_TENSOR

    @cached_property
    def device(self) -> torch.device:
        """The device of the model's first parameter; the CPU without parameters."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's first floating-point parameter; float32 without one."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    def run(self, batch: Batch) -> Any:
        """Run the model on a batch, moved to its device and dtype; returns its output."""
        moved = batch.to(self.module)
        return run(self.module, moved.args, moved.kwargs)


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Set models to evaluation mode with gradients enabled but required by no parameter; restores them afterwards."""
    training = {module: module.training for model in modules for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for model in modules for parameter in model.parameters()}
    try:
        for model in modules:
            model.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


def make_subject(module: nn.Module, checkpoint: Checkpoint | None = None) -> Subject:
    """The model under the names of its state_dict, or of the checkpoint that it was loaded from.

    Raises FormatError if the model's values differ from the checkpoint's, PlanError if the model has no parameters, or
    no values for them.
    """
    if not any(p.is_floating_point() for p in module.parameters()):
        raise PlanError(
            f"{type(module).__name__} has no parameters, so there is nothing to collect. Give a model with some"
        )
    empty = [name for name, x in (*module.named_parameters(), *module.named_buffers()) if x.is_meta]
    if empty:
        listed = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise PlanError(
            f"{listed} of {type(module).__name__}: on the meta device, expected values; load the model into memory"
        )
    if checkpoint is not None:
        return Subject(module, checkpoint.content, *locate_tensors(module, checkpoint))
    state = {name: x for name, x in module.state_dict().items() if isinstance(x, Tensor)}
    names = dict(module.named_parameters(remove_duplicate=False))
    return Subject(module, content_of(state), {name: name for name in names if name in state})
