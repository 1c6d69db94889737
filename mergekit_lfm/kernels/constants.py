"""Numbers that a solve found, as tensors: made once for each device and thread, as every upload waits for the GPU."""

from __future__ import annotations

from functools import lru_cache
from threading import get_ident
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Numbers = float | tuple[float, ...]


def constant(numbers: Numbers, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """The numbers as a tensor, by default on torch's default device. Others may hold it: it is not to be changed."""
    import torch

    return _made(numbers, repr(numbers), dtype, device or torch.get_default_device(), get_ident())


@lru_cache(maxsize=4096)
def _made(numbers: Numbers, text: str, dtype: torch.dtype, device: torch.device, thread: int) -> torch.Tensor:  # noqa: ARG001
    """text: by which -0 is not 0. thread: on whose stream the tensor's memory is used, and given back."""
    import torch

    return torch.tensor(numbers, dtype=dtype, device=device)
