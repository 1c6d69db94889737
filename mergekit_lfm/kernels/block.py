"""The block, the unit of arithmetic: its size, and the views of it for reductions and elementwise functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 18  # elements; every sum runs over blocks of this size, whatever the memory or number of threads

SEGMENT = 64  # blocks; the unit of digests and of resumption, and of parallel work within a large tensor

LANES = 4096  # partial sums of a block on a device; element e belongs to lane e % LANES

Rows = Sequence["torch.Tensor"]

Elementwise = Callable[[Rows, "torch.Tensor | None", Any], Any]


class Block(Protocol):
    """One block of a unit's inputs. start: index in its tensor of the first element; count: number of elements.

    dtype: of the arithmetic, float32 or float64.
    """

    def __len__(self) -> int:
        """The number n of inputs."""

    @property
    def start(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def stored(self) -> tuple[torch.Tensor, ...]:
        """The inputs as they are stored, [count]."""

    @property
    def stored_base(self) -> torch.Tensor | None:
        """The base as it is stored, or None."""

    def row(self, i: int) -> torch.Tensor:
        """Input i, or its delta to the base if there is one, [count], in fresh memory."""

    def each(self, function: Elementwise, local: Any) -> Any:
        """function(rows, base, local), perhaps compiled: a pure function of tensors, elementwise in the rows.

        local: a tensor, or tuples of tensors, None and bool.
        """

    def settle(self, local: Any) -> Any:
        """local with masks in place of coins that depend on ranks, see `kernels.random.settle`."""

    def sums_by_rank(self, local: Any) -> torch.Tensor:
        """Sums of magnitudes before and after masks by `kernels.random.LocalRankedCoins`, float64 [n, 2]."""


class Chunk(Block, Protocol):
    """Several neighbouring blocks at once, on a device. size: elements of a block; the last may be shorter.

    native: True to use hand-written kernels if available.
    """

    @property
    def size(self) -> int: ...

    @property
    def native(self) -> bool: ...

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """Every block with its number in the tensor."""


class Coefficients(Protocol):
    """The result of a solve. It makes tensors on torch's default device, which is the block's."""

    def at(self, start: int, count: int, dtype: torch.dtype) -> Any:
        """The `local` of `apply` and `Block.each` for the block of `count` elements from index `start`."""
