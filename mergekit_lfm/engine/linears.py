"""Linear layers as matrices, read from checkpoints and statistics files by rows, or held in memory.

Matrices are on torch's default device, whichever memory they were read into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mergekit_lfm.plan.sources import TensorRef

ReadTensor = Callable[[TensorRef, int, int], torch.Tensor]  # a tensor's elements from the first to the last, 1-D


@dataclass(frozen=True)
class StoredLinear:
    """A `Linears` that is read on demand. The bias is the matrices' last column.

    weights, biases, grams: one for each input model; biases is () for a layer without one. axis: the weights' axis of
    inputs: 1 for [outputs, inputs], 0 for [inputs, outputs].
    """

    read: ReadTensor
    weights: Sequence[TensorRef]
    biases: Sequence[TensorRef]
    grams: Sequence[TensorRef]
    axis: int
    outputs: int
    inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, columns) of the matrices."""
        return self.outputs, self.inputs + bool(self.biases)

    def matrix(self, i: int, start: int, stop: int) -> torch.Tensor:
        """Rows of input i's matrix, [stop - start, columns] float64."""
        rows = torch.empty(stop - start, self.shape[1], dtype=torch.float64)
        if self.axis:
            weight = self.read(self.weights[i], start * self.inputs, stop * self.inputs).view(-1, self.inputs)
        else:
            weight = self.read(self.weights[i], 0, self.inputs * self.outputs).view(self.inputs, -1)[:, start:stop].T
        rows[:, : self.inputs] = weight.to(rows.device)  # in its stored dtype: float64 would be four times the bytes
        if self.biases:
            rows[:, -1] = self.read(self.biases[i], start, stop)
        return rows

    def gram(self, i: int, start: int, stop: int) -> torch.Tensor:
        """Rows of input i's Gram matrix, [stop - start, columns] float64."""
        width = self.inputs + 1
        rows = self.read(self.grams[i], start * width, stop * width).view(-1, width)
        return rows[:, : self.shape[1]].to(torch.get_default_device()).to(torch.float64, copy=True)

    def parts(self, merged: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A merged matrix as the checkpoint stores it: the weight, flat, and the bias."""
        weight = merged[:, : self.inputs]
        return (weight if self.axis else weight.T).reshape(-1), merged[:, -1].contiguous() if self.biases else None


@dataclass(frozen=True)
class InMemoryLinear:
    """A `Linears` of matrices and Gram matrices in memory."""

    matrices: Sequence[torch.Tensor]
    grams: Sequence[torch.Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs) of the matrices."""
        outputs, inputs = self.matrices[0].shape
        return outputs, inputs

    def matrix(self, i: int, start: int, stop: int) -> torch.Tensor:
        """Rows of input i's matrix, as float64 on fresh memory."""
        return self.matrices[i][start:stop].to(torch.get_default_device(), torch.float64, copy=True)

    def gram(self, i: int, start: int, stop: int) -> torch.Tensor:
        """Rows of input i's Gram matrix, as float64 on fresh memory."""
        return self.grams[i][start:stop].to(torch.get_default_device(), torch.float64, copy=True)
