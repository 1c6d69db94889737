"""A model that statistics are taken of: how it is run, and which tensor of its checkpoint each parameter is.

A name alone is no proof: transformers adds and removes prefixes, and a model may have been trained since it was loaded.
So a parameter is the tensor of a checkpoint only if it holds the same values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor, nn

from mergekit_lfm.checkpoint import Checkpoint, bytes_of, content_digest
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.tensors import TensorSpec

if TYPE_CHECKING:
    from mergekit_lfm.data import Batch

NO_TENSOR = "the checkpoint has no tensor of its own for it"


@dataclass(frozen=True)
class Subject:
    """A model with the digest of its content, and the tensors that each parameter is, by the parameter's name."""

    module: nn.Module
    digest: str
    tensors: Mapping[str, str]  # a parameter that has several names occurs with each of them

    @cached_property
    def names(self) -> dict[int, list[str]]:
        """All names of each parameter, by the parameter's id; the first is that of `named_parameters`."""
        found: dict[int, list[str]] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            found.setdefault(id(parameter), []).append(name)
        return found

    @cached_property
    def owners(self) -> Counter[int]:
        """How many modules have each parameter for their own, by the parameter's id."""
        return Counter(
            key for module in self.module.modules() for key in {id(p) for p in module.parameters(recurse=False)}
        )

    def tensors_of(self, parameter: nn.Parameter) -> list[str]:
        """The tensors of the checkpoint that hold the parameter; more than one where it is stored twice."""
        names = self.names.get(id(parameter), ())
        return list(dict.fromkeys(self.tensors[name] for name in names if name in self.tensors))

    @cached_property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the model computes in: the dtype of its first floating parameter."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    def run(self, batch: Batch) -> Any:
        """What the model returns for a batch, which is brought to its device and dtype."""
        moved = batch.to(self.module)
        return self.module(*moved.args, **moved.kwargs)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Models in evaluation mode, no parameter requiring gradients, but recorded; afterwards as they were."""
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

    Raises FormatError where the model does not hold what the checkpoint does, PlanError for a model without parameters.
    """
    if not any(p.is_floating_point() for p in module.parameters()):
        raise PlanError(
            f"{type(module).__name__} has no parameters: there is nothing to collect; give a model with some"
        )
    if checkpoint is not None:
        return Subject(module, checkpoint.content, _located(module, checkpoint))
    state = {name: x for name, x in module.state_dict().items() if isinstance(x, Tensor)}
    names = dict(module.named_parameters(remove_duplicate=False))
    return Subject(module, _content(state), {name: name for name in names if name in state})


def _content(state: Mapping[str, Tensor]) -> str:
    digests = {}
    for name, x in state.items():
        spec = TensorSpec(name, tuple(x.shape), str(x.dtype).removeprefix("torch."))
        digests[spec] = xxhash.xxh3_128_hexdigest(bytes_of(x.detach().cpu().contiguous()))
    return content_digest(digests)


def _located(module: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """The tensor of every parameter that has one, by the names of parameters."""
    names = dict(module.named_parameters(remove_duplicate=False))
    changes = _changes(list(names), checkpoint)
    found: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for name, parameter in names.items():
        candidates = [added + name.removeprefix(removed) for removed, added in changes if name.startswith(removed)]
        candidates = [tensor for tensor in candidates if tensor in checkpoint]
        for tensor in candidates:
            if _agree(parameter, checkpoint, tensor):
                found[name] = tensor
                break
        else:
            if candidates:
                wrong[name] = candidates[0]
    known = {id(names[name]) for name in found} | {id(names[name]) for name in wrong}
    for name in [name for name, parameter in names.items() if id(parameter) not in known]:
        same = [t for t in checkpoint if t not in found.values() and _agree(names[name], checkpoint, t)]
        if len(same) == 1:
            found[name] = same[0]
    if wrong or not found:
        lines = [f"{name}: not what {tensor} is" for name, tensor in sorted(wrong.items())]
        raise FormatError(
            f"{checkpoint.path} is not the checkpoint of this model:\n  "
            + "\n  ".join(lines or ["none of its tensors is a parameter of the model"])
            + "\nWas the model changed since it was loaded? Save it, and give the checkpoint that it was saved to"
        )
    return found


def _changes(names: list[str], checkpoint: Mapping[str, TensorSpec]) -> list[tuple[str, str]]:
    """(prefix to remove, prefix to add) that lead from names to tensors: none, then those that suit most names."""
    suits: Counter[tuple[str, str]] = Counter()
    for name in names:
        suits.update((name[:i], "") for i in _tails(name) if name[i:] in checkpoint)
    inside = set(names)
    for tensor in checkpoint:
        suits.update(("", tensor[:i]) for i in _tails(tensor) if tensor[i:] in inside)
    return [("", ""), *(change for change, _ in suits.most_common())]


def _tails(name: str) -> Iterator[int]:
    """Where the parts of a dotted name begin, but for the first."""
    return (i + 1 for i, letter in enumerate(name) if letter == ".")


def _agree(parameter: Tensor, checkpoint: Checkpoint, tensor: str) -> bool:
    """Whether the tensor, in the dtype of the parameter, is the parameter, bit for bit."""
    if checkpoint[tensor].shape != tuple(parameter.shape):
        return False
    stored = checkpoint.read(tensor).to(parameter.dtype)
    held = parameter.detach().cpu().reshape(-1)
    return torch.equal(stored.view(torch.uint8), held.view(torch.uint8))
