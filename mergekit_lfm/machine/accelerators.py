"""A GPU as the engine sees it: tensors go up from pinned memory and come down to it, each worker on its own stream.

While one worker waits for its disk, the copies and kernels of the others go on; within a worker all is in order. On the
processor, where the tests run, the same calls copy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import local

import torch

CHUNK = 16  # blocks that a GPU is given at once, at most: 2^22 elements, which float32 intermediates fit the cache with
USED = 0.8  # of the free memory of a GPU; the rest is for the caches of its libraries and for fragments


@dataclass(frozen=True)
class Accelerator:
    """Where arithmetic runs instead of the processor."""

    device: torch.device
    _mine: local = field(default_factory=local, compare=False)

    @property
    def _cuda(self) -> bool:
        return self.device.type == "cuda"

    @contextmanager
    def working(self) -> Iterator[None]:
        """Within, what this thread asks of the GPU is on a stream of its own."""
        if not self._cuda:
            yield
            return
        if not hasattr(self._mine, "stream"):
            self._mine.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._mine.stream):
            yield

    def buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Pinned memory, which is not given to another while copies from it are on their way."""
        return torch.empty(numel, dtype=dtype, pin_memory=self._cuda)

    def up(self, x: torch.Tensor, to: torch.Tensor | None = None) -> torch.Tensor:
        """x, of a `buffer`, on the device, or in a tensor there: on its way, but before what is asked for next."""
        if to is None:
            to = torch.empty(x.shape, dtype=x.dtype, device=self.device)
        return to.copy_(x, non_blocking=True)

    def down(self, x: torch.Tensor) -> torch.Tensor:
        """x, which has arrived, in the processor's memory."""
        home = self.buffer(x.numel(), x.dtype)
        home.copy_(x, non_blocking=True)
        self.settle()
        return home

    def settle(self) -> None:
        """Wait for all that this thread has asked of the device."""
        if self._cuda:
            torch.cuda.current_stream(self.device).synchronize()

    def load_solvers(self) -> None:
        """Have torch load its library of solvers, which fails where several threads are the first to need it.

        Its products are the same for any number of streams only with a workspace of constant size for each.
        """
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.linalg.cholesky_ex(torch.ones(1, 1, dtype=torch.float64, device=self.device))

    def room(self) -> int:
        """Bytes of the device that chunks may take; as many are for what stays there while several chunks pass."""
        if not self._cuda:
            return 1 << 62
        torch.cuda.empty_cache()  # what torch keeps of earlier work is free, too
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(USED * free) // 2


def name_of(gpu: Accelerator | None) -> str:
    """What torch calls the GPU, or the processor where there is none."""
    return "cpu" if gpu is None else str(gpu.device)
