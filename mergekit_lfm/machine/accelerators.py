"""A GPU for the engine: tensors go up from pinned memory and come down to it, each worker on its own stream.

While one worker waits for its disk, the copies and kernels of the others continue; each worker's own run in order. On
the processor, as in tests without a GPU, the same calls copy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import local

import torch

CHUNK = 16  # the most blocks that a GPU gets at once: with 2^22 elements, float32 intermediates fit its cache
USED = 0.8  # share of a GPU's free memory to use; the rest is for the caches of its libraries and for fragments


@dataclass(frozen=True)
class Accelerator:
    """The device that does arithmetic instead of the processor."""

    device: torch.device
    _mine: local = field(default_factory=local, compare=False)

    @property
    def _cuda(self) -> bool:
        return self.device.type == "cuda"

    @contextmanager
    def use_own_stream(self) -> Iterator[None]:
        """Run this thread's GPU work on a stream of its own."""
        if not self._cuda:
            yield
            return
        if not hasattr(self._mine, "stream"):
            self._mine.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._mine.stream):
            yield

    def buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Pinned memory that torch does not reuse while copies from it are running."""
        return torch.empty(numel, dtype=dtype, pin_memory=self._cuda)

    def up(self, x: torch.Tensor, to: torch.Tensor | None = None) -> torch.Tensor:
        """Start copying x (from `buffer`) to the device, into `to` if given. Later work on this stream sees it."""
        if to is None:
            to = torch.empty(x.shape, dtype=x.dtype, device=self.device)
        return to.copy_(x, non_blocking=True)

    def down(self, x: torch.Tensor) -> torch.Tensor:
        """Copy x to the processor's memory, and wait for it."""
        home = self.buffer(x.numel(), x.dtype)
        home.copy_(x, non_blocking=True)
        self.wait()
        return home

    def wait(self) -> None:
        """Wait for all of this thread's work on the device."""
        if self._cuda:
            torch.cuda.current_stream(self.device).synchronize()

    def load_solvers(self) -> None:
        """Make torch load its library of solvers, which fails if several threads are the first to need it.

        Products are the same for any number of streams only if each stream has a workspace of constant size.
        """
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.linalg.cholesky_ex(torch.ones(1, 1, dtype=torch.float64, device=self.device))

    def room(self) -> int:
        """Bytes of device memory for chunks; the same amount is left for data that stay there across chunks."""
        if not self._cuda:
            return 1 << 62
        torch.cuda.empty_cache()  # memory that torch keeps from earlier work counts as free, too
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(USED * free) // 2


def name_of(gpu: Accelerator | None) -> str:
    """Torch's name of the device; "cpu" for None."""
    return "cpu" if gpu is None else str(gpu.device)
