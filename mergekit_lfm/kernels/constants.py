"""A solve's numbers as tensors: made once for each device and thread, as every upload waits for the GPU."""

from __future__ import annotations

from functools import lru_cache
from threading import get_ident
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Numbers = float | tuple[float, ...]


def constant(numbers: Numbers, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """The numbers as a tensor, by default on torch's default device. It is shared: do not change it."""
    import torch

    return _made(numbers, repr(numbers), dtype, device or torch.get_default_device(), get_ident())


@lru_cache(maxsize=4096)
def _made(numbers: Numbers, text: str, dtype: torch.dtype, device: torch.device, thread: int) -> torch.Tensor:  # noqa: ARG001
    """text: part of the key, to distinguish -0 from 0. thread: its stream uses and frees the tensor's memory."""
    import torch

    return torch.tensor(numbers, dtype=dtype, device=device)
