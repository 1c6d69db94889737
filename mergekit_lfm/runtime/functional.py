"""Models as functions of their parameters, so that torch.func can derive through steps of training.

Models of transformers need two things for that. Their fused attention has no second derivative on a processor, so they
compute attention in the plain way. And they look into a mask of padding [n, tokens] to see whether it hides anything,
which a function over many tasks at once (vmap) cannot do, so it becomes an additive one [n, 1, tokens, tokens].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.runtime.load import looks_ahead

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class FunctionalModel:
    """A model whose parameters are arguments. causal: whether a token of a text sees only those before it.

    core: the model of transformers within, whose masks are made additive; by default the model.
    """

    model: nn.Module
    causal: bool = False
    core: nn.Module | None = None

    def at(self, parameters: Parameters) -> BoundModel:
        """The model with other values for some of its parameters, by their names."""
        return BoundModel(self, parameters)


class BoundModel(nn.Module):
    """A model at parameters, which are not its own: called like a model, and so an argument of losses."""

    def __init__(self, function: FunctionalModel, parameters: Parameters) -> None:
        super().__init__()
        self.run = partial(torch.func.functional_call, function.model, dict(parameters))
        self.function = (function.core or function.model, function.causal)  # in a tuple, so that it isn't a submodule

    def forward(self, *inputs: Tensor, **named: Any) -> Any:
        """The output of the model."""
        core, causal = self.function
        with _additive_masks(core, causal=causal):
            return self.run(inputs, named)


@contextmanager
def _additive_masks(core: nn.Module, *, causal: bool) -> Iterator[None]:
    """A mask of padding that a model is given comes as an additive one."""

    def change(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = named.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            floats = (x.dtype for x in named.values() if isinstance(x, Tensor) and x.is_floating_point())
            mask = additive_mask(mask, next(floats, torch.float32), causal=causal)
        return inputs, named | ({} if mask is None else {"attention_mask": mask})

    handle = core.register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def functional_model(model: nn.Module) -> FunctionalModel:
    """A model as a function of its parameters. The model itself computes attention in the plain way from then on."""
    core = use_plain_attention(model)
    trunk: Any = getattr(model, getattr(model, "base_model_prefix", "") or "base_model", model)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is None:  # no model of texts
        return FunctionalModel(model, core=core)
    return FunctionalModel(model, not looks_ahead(trunk, None, lambda output: output[0]), core)


def use_plain_attention(model: nn.Module) -> nn.Module | None:
    """Have a model of transformers compute attention in the plain way, which alone shows it and has two slopes.

    The model of transformers within, if there is one.
    """
    for module in model.modules():
        if hasattr(type(module), "set_attn_implementation"):  # its own, not one of a model within
            core: Any = module
            core.set_attn_implementation("eager")
            return module
    return None


def additive_mask(mask: Tensor, dtype: torch.dtype = torch.float32, *, causal: bool) -> Tensor:
    """A mask of padding [n, tokens] as what is added to the scores of attention, [n, 1, tokens, tokens].

    0 where a token (third axis) sees another one (fourth), the least number of the dtype where it does not. A token of
    the padding sees what the text sees, so that no row hides everything.
    """
    tokens = mask.shape[-1]
    seen = mask.bool()[:, None, None, :].expand(-1, 1, tokens, tokens)
    if causal:
        seen = seen & torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
