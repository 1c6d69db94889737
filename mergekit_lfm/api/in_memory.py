"""Models in memory as arguments: state dicts and modules whose entries are tensors with names and data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.kernels.sums import round_once
from mergekit_lfm.recipe.problems import Problem, refuse
from mergekit_lfm.store.tensors import FLOATS

if TYPE_CHECKING:
    import torch


def refuse_other_types(models: object, parameters: object, seed: object) -> None:
    """Raise PlanError about arguments of another type than `merge_state_dicts` takes."""
    problems = []
    if not isinstance(models, Mapping | Sequence) or isinstance(models, str):
        text = f"found {type(models).__name__}, expected a list of state dicts, or a mapping from names to them"
        problems.append(Problem("models", text))
    if not isinstance(parameters, Mapping | None):
        text = f"found {type(parameters).__name__}, expected a mapping from names to values"
        problems.append(Problem("parameters", text))
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        problems.append(Problem("seed", f"found {seed!r}, expected a whole number from 0 to 2^64 - 1"))
    refuse(problems)


@dataclass(frozen=True, slots=True)
class Dtypes:
    """The dtypes of a merge in memory: of the result, None for that to which those of the tensors promote.

    double: True for arithmetic in float64.
    """

    out: torch.dtype | None
    double: bool

    def widen(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor that is to be merged, so wide that only the result is rounded."""
        import torch

        least = torch.float64 if self.double else torch.float32
        return x if self.out is None else x.to(torch.promote_types(x.dtype, least))

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """A merged tensor in the dtype of the result."""
        return x if self.out is None else round_once(x, self.out)


def read_dtypes(dtype: torch.dtype | str | None, out_dtype: torch.dtype | str | None) -> Dtypes:
    """The dtypes of a merge in memory. Raises PlanError for one that is not of floating-point numbers."""
    import torch

    read, problems = list[torch.dtype | None](), list[Problem]()
    for name, given in (("dtype", dtype), ("out_dtype", out_dtype)):
        text = None if given is None else str(given).removeprefix("torch.")
        if text is not None and text not in FLOATS:
            problems.append(Problem(name, f"found {given!r}, expected one of {', '.join(FLOATS)}"))
        read.append(None if text is None or text not in FLOATS else getattr(torch, text))
    refuse(problems)
    wanted, out = read
    return Dtypes(out or wanted, wanted == torch.float64)


def is_model(value: object) -> bool:
    """True for a state dict or a module."""
    import torch

    return isinstance(value, Mapping | torch.nn.Module)


def as_state_dict(model: Any, name: str) -> Mapping[str, torch.Tensor]:
    """The tensors of a state dict or a module by their names. Raises PlanError about all other entries."""
    import torch

    tensors = model.state_dict() if isinstance(model, torch.nn.Module) else model
    if not isinstance(tensors, Mapping):
        raise PlanError(f"model {name}: found {type(model).__name__}, expected a state dict: names to tensors")
    problems = [
        f"model {name}: {key!r}: {wrong}" for key, tensor in tensors.items() if (wrong := _describe_fault(key, tensor))
    ]
    if problems:
        raise PlanError(several("the models hold what cannot be merged", problems))
    return tensors


def _describe_fault(key: object, tensor: object) -> str:
    """The fault of an entry of a state dict, and what to do; "" for a tensor with a name."""
    import torch

    if not isinstance(key, str):
        return f"found a name of type {type(key).__name__}, expected text; rename the tensor"
    if not isinstance(tensor, torch.Tensor):
        return f"found {type(tensor).__name__}, expected a tensor; leave the entry out"
    if tensor.is_meta:
        return "found a tensor on the meta device, which has no data; load the weights first"
    if tensor.layout != torch.strided:
        return f"found a tensor of layout {tensor.layout}, expected a dense one; call its `to_dense`"
    return ""
