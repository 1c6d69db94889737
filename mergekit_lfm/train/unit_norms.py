"""Linear layers whose matrices have the spectral norm 1 while they are trained, and afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.train.hooks import Hook, Parameters


class UnitNorms(Hook):
    """Has linear layers run with their matrices divided by their largest singular values: they lengthen no vector.

    The undivided matrices are the parameters, and the gradient is that through the division. `fold`, after the
    training, puts the divided ones into these parameters. Nothing but the parameters is needed to go on. Source: Miyato
    et al. 2018, arXiv 1802.05957, section 2.1, by singular values in place of steps of a power iteration.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers, self._handles = tuple(layers), list[Any]()

    def begin(self, parameters: Parameters) -> None:  # noqa: ARG002
        self._handles = [layer.register_forward_hook(_run_divided) for layer in self.layers]

    @torch.no_grad()
    def fold(self) -> None:
        """Have the layers be linear ones as any other, with the same outputs."""
        for handle in self._handles:
            handle.remove()
        for layer in self.layers:
            layer.weight.copy_(divide(layer.weight))


def divide(matrix: Tensor) -> Tensor:
    """A matrix [out, in] divided by its largest singular value."""
    largest: Tensor = torch.linalg.matrix_norm(matrix, ord=2)
    return matrix / largest


def _run_divided(layer: nn.Module, inputs: tuple[Any, ...], _: object) -> Tensor:
    """The output of a linear layer with its matrix divided; that of the matrix as it is goes to nothing."""
    assert isinstance(layer, nn.Linear)
    return nn.functional.linear(inputs[0], divide(layer.weight), layer.bias)
