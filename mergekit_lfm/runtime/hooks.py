"""Reads and replaces the inputs and outputs of modules while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def state_of(output: Any) -> Tensor:
    """The hidden states in the output of a block or MLP: the tensor, or the first of a tuple."""
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state


@contextmanager
def hook_modules(
    hooks: Mapping[nn.Module, Callable[[Tensor], Tensor | None]], *, inputs: bool = False
) -> Iterator[None]:
    """Call a function with the output (or first input) of each module as the model runs; its result replaces that.

    The hooks are removed at the end, also after an error.
    """

    def after(function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            new = function(state_of(output))
            return None if new is None else (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    def before(function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any) -> Any:
            new = function(args[0])
            return None if new is None else (new, *args[1:])

        return hook

    handles = [
        module.register_forward_pre_hook(before(f)) if inputs else module.register_forward_hook(after(f))
        for module, f in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
