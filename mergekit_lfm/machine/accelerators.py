"""Where the engine's arithmetic runs: the host's processor or a GPU, behind one interface.

A device says how many blocks it takes at a time, gives readers whose ranges lie where it computes, brings results back,
and knows the memory that it offers. A GPU's tensors go up from pinned memory and come down to it, each worker's on a
stream of its own: while one waits for its disk, the copies and kernels of the others continue. On the processor, as in
tests without a GPU, `Gpu` makes the same calls. Imports torch only to compute.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from threading import local
from typing import TYPE_CHECKING, ClassVar, final

from mergekit_lfm.machine.resources import default_threads

if TYPE_CHECKING:
    import torch

CHUNK = 16  # the most blocks that a GPU reads at once: with 2^22 elements, float32 intermediates fit its cache
RESIDENT_CHUNK = 64  # the most of a tensor that it holds: a segment
WORKERS = 16  # threads that feed a GPU by default: more would share its memory, and so work on smaller chunks
USED = 0.8  # share of a GPU's free memory to use; the rest is for the caches of its libraries and for fragments

Fill = Callable[[int, "torch.Tensor"], None]  # fills host memory with a tensor's elements from the first on
ReadRange = Callable[[int, int], "torch.Tensor"]  # (first element, last) -> 1-D tensor of the stored dtype


class Accelerator(ABC):
    """A device that does the arithmetic of merges. Picklable; equal if the device is.

    chunk, resident_chunk: the most blocks that it takes at a time, of tensors that are read for it and of those that it
    holds. by_chunk: reductions take their form for chunks. reads_ahead: a range stays valid while the next is read.
    """

    chunk: ClassVar[int]
    resident_chunk: ClassVar[int]
    by_chunk: ClassVar[bool]
    reads_ahead: ClassVar[bool]

    name: str  # torch's

    @property
    def device(self) -> torch.device:
        """The device for torch."""
        import torch

        return torch.device(self.name)

    @property
    @abstractmethod
    def threads(self) -> int:
        """The number of threads to use by default."""

    @abstractmethod
    def room(self, host: int) -> int:
        """Bytes for the tensors in work, if the engine may hold `host` bytes of the host's memory for them."""

    @abstractmethod
    def stream(self) -> AbstractContextManager[None]:
        """Context in which this thread computes on the device."""

    @abstractmethod
    def reader(self, most: int, dtype: torch.dtype, fill: Fill) -> ReadRange:
        """A reader of ranges of up to `most` elements on the device; the next call may overwrite a range."""

    @abstractmethod
    def load(self, numel: int, most: int, dtype: torch.dtype, fill: Fill) -> torch.Tensor:
        """All elements on the device, read in ranges of `most`."""

    @abstractmethod
    def down(self, x: torch.Tensor) -> torch.Tensor:
        """x in the host's memory, complete."""

    @abstractmethod
    def flag(self) -> torch.Tensor | None:
        """A cleared flag [1] that kernels set where a value is not finite; None to look at the values themselves."""

    @abstractmethod
    def load_solvers(self) -> None:
        """Prepare the device's linear algebra for several threads."""


@final
@dataclass(frozen=True)
class Host(Accelerator):
    """The processor: tensors are read where it computes."""

    chunk: ClassVar[int] = 1
    resident_chunk: ClassVar[int] = 1
    by_chunk: ClassVar[bool] = False
    reads_ahead: ClassVar[bool] = False
    name: str = "cpu"

    @property
    def threads(self) -> int:
        return default_threads()

    def room(self, host: int) -> int:
        return host

    def stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def reader(self, most: int, dtype: torch.dtype, fill: Fill) -> ReadRange:
        import torch

        memory = torch.empty(most, dtype=dtype)

        def read(start: int, stop: int) -> torch.Tensor:
            part = memory[: stop - start]
            fill(start, part)
            return part

        return read

    def load(self, numel: int, most: int, dtype: torch.dtype, fill: Fill) -> torch.Tensor:  # noqa: ARG002
        import torch

        whole = torch.empty(numel, dtype=dtype)
        fill(0, whole)
        return whole

    def down(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def flag(self) -> None:
        return None

    def load_solvers(self) -> None:
        pass


@final
@dataclass(frozen=True)
class Gpu(Accelerator):
    """A GPU, with each worker's work on a stream of its own."""

    chunk: ClassVar[int] = CHUNK
    resident_chunk: ClassVar[int] = RESIDENT_CHUNK
    by_chunk: ClassVar[bool] = True
    reads_ahead: ClassVar[bool] = True
    name: str
    _mine: local = field(default_factory=local, compare=False, repr=False)

    def __reduce__(self) -> tuple[type[Gpu], tuple[str]]:
        return Gpu, (self.name,)

    @property
    def threads(self) -> int:
        return min(WORKERS, default_threads())

    @property
    def _cuda(self) -> bool:
        return self.name.startswith("cuda")

    def room(self, host: int) -> int:  # noqa: ARG002
        """Half of the free memory that is used; as much is left for data that stay there across chunks."""
        if not self._cuda:
            return 1 << 62
        import torch

        torch.cuda.empty_cache()  # memory that torch keeps from earlier work counts as free, too
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(USED * free) // 2

    @contextmanager
    def stream(self) -> Iterator[None]:
        if not self._cuda:
            yield
            return
        import torch

        if not hasattr(self._mine, "stream"):
            self._mine.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._mine.stream):
            yield

    def reader(self, most: int, dtype: torch.dtype, fill: Fill) -> ReadRange:  # noqa: ARG002
        def read(start: int, stop: int) -> torch.Tensor:
            pinned = self._pin(stop - start, dtype)
            fill(start, pinned)
            return self._up(pinned)

        return read

    def load(self, numel: int, most: int, dtype: torch.dtype, fill: Fill) -> torch.Tensor:
        import torch

        whole = torch.empty(numel, dtype=dtype, device=self.device)
        for number, start in enumerate(range(0, numel, most)):
            pinned = self._pin(min(numel, start + most) - start, dtype)
            fill(start, pinned)
            self._up(pinned, whole[start : start + most])
            if number % 2:  # one range is read while another is copied; no more than two are pinned
                self._wait()
        return whole

    def down(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cpu:
            return x
        host = self._pin(x.numel(), x.dtype)
        host.copy_(x, non_blocking=True)
        self._wait()
        return host

    def flag(self) -> torch.Tensor:
        import torch

        return torch.zeros(1, dtype=torch.int32, device=self.device)

    def load_solvers(self) -> None:
        """Make torch load its library of solvers, which fails if several threads are the first to need it.

        Products are the same for any number of streams only if each stream has a workspace of constant size.
        """
        import torch

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.linalg.cholesky_ex(torch.ones(1, 1, dtype=torch.float64, device=self.device))

    def _pin(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Pinned memory that torch does not reuse while copies from it are running."""
        import torch

        return torch.empty(numel, dtype=dtype, pin_memory=self._cuda)

    def _up(self, pinned: torch.Tensor, to: torch.Tensor | None = None) -> torch.Tensor:
        """Start copying to the device, into `to` if given. Later work on this stream sees it."""
        import torch

        target = torch.empty(pinned.shape, dtype=pinned.dtype, device=self.device) if to is None else to
        return target.copy_(pinned, non_blocking=True)

    def _wait(self) -> None:
        """Wait for all of this thread's work on the device."""
        if self._cuda:
            import torch

            torch.cuda.current_stream(self.device).synchronize()


HOST = Host()


def accelerator_of(gpu: torch.device | None) -> Accelerator:
    """The GPU, or the host for None."""
    return HOST if gpu is None else Gpu(str(gpu))
