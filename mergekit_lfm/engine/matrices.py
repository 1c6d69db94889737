"""Tensors as whole matrices, read from checkpoints and statistics files by rows, or held in memory.

Matrices are on torch's default device, whichever memory they were read into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mergekit_lfm.plan.matrices import MatrixJob
from mergekit_lfm.plan.roles import TensorRef

ReadTensor = Callable[[TensorRef, int, int], torch.Tensor]  # a tensor's elements from the first to the last, 1-D


@dataclass(frozen=True)
class StoredMatrices:
    """`Matrices` that are read on demand. A bias is the matrices' last column."""

    read: ReadTensor
    job: MatrixJob

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrices."""
        return self.job.rows, self.job.columns

    def matrix(self, i: int, start: int, stop: int) -> torch.Tensor:
        """Rows of input i's matrix, less the base's if there is one, [stop - start, columns] float64."""
        rows = self._rows(self.job.weights[i], self.job.biases[i] if self.job.biases else None, start, stop)
        return rows if self.job.base is None else rows.sub_(self.base(start, stop))

    def base(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the base's matrix, [stop - start, columns] float64."""
        assert self.job.base is not None
        return self._rows(self.job.base, None, start, stop)

    def _rows(self, weight: TensorRef, bias: TensorRef | None, start: int, stop: int) -> torch.Tensor:
        outputs, inputs = self.job.rows, self.job.columns - (bias is not None)
        rows = torch.empty(stop - start, self.job.columns, dtype=torch.float64)
        if self.job.transposed:
            stored = self.read(weight, 0, inputs * outputs).view(inputs, -1)[:, start:stop].T
        else:
            stored = self.read(weight, start * inputs, stop * inputs).view(-1, inputs)
        rows[:, :inputs] = stored.to(rows.device)  # in its stored dtype: float64 would be four times the bytes
        if bias is not None:
            rows[:, -1] = self.read(bias, start, stop)
        return rows

    def gram(self, i: int, start: int, stop: int) -> torch.Tensor:
        """Rows of input i's Gram matrix, [stop - start, columns] float64."""
        width = self.job.columns + (not self.job.biases)  # with the mean as its last row and column
        rows = self.read(self.job.grams[i], start * width, stop * width).view(-1, width)
        return rows[:, : self.job.columns].to(torch.get_default_device()).to(torch.float64, copy=True)

    def parts(self, merged: torch.Tensor) -> list[torch.Tensor]:
        """A merged matrix as the checkpoint stores it: the weight, flat, and the bias if there is one."""
        weight = merged[:, :-1] if self.job.biases else merged
        flat = (weight.T if self.job.transposed else weight).reshape(-1)
        return [flat, merged[:, -1].contiguous()] if self.job.biases else [flat]


@dataclass(frozen=True)
class InMemoryMatrices:
    """`Matrices` in memory, with a base or Gram matrices for methods that take these."""

    matrices: Sequence[torch.Tensor]
    grams: Sequence[torch.Tensor] = ()
    base_matrix: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrices."""
        rows, columns = self.matrices[0].shape
        return rows, columns

    def matrix(self, i: int, start: int, stop: int) -> torch.Tensor:
        """Rows of input i's matrix, less the base's if there is one, as float64 on fresh memory."""
        rows = _wide(self.matrices[i][start:stop])
        return rows if self.base_matrix is None else rows.sub_(self.base(start, stop))

    def base(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the base's matrix, as float64 on fresh memory."""
        assert self.base_matrix is not None
        return _wide(self.base_matrix[start:stop])

    def gram(self, i: int, start: int, stop: int) -> torch.Tensor:
        """Rows of input i's Gram matrix, as float64 on fresh memory."""
        return _wide(self.grams[i][start:stop])


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.get_default_device(), torch.float64, copy=True)
