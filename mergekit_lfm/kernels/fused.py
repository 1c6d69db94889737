"""Elementwise functions over a block, from the stored bytes to the stored bytes: eagerly, or compiled to one loop.

The function is the same source in both cases, and so are the bits: it uses only + - * /, comparisons and integer
operations, none of which the compiler may contract or approximate. Compiled (C++ with the CPU's vector instructions,
by torch's inductor) TIES takes 0.3 ms for 2^18 elements of three models and eagerly 3 ms. Compiling takes 10 to 25 s,
so it is done only for large merges; the libraries are kept on disk, and loading one takes 10 ms.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, Literal, Protocol

import torch
import xxhash

from mergekit_lfm.kernels.sums import round_once

Mode = Literal["auto", "always", "never"]
COMPILE_SECONDS = 10  # about what compiling one function takes
Elementwise = Callable[[Sequence[torch.Tensor], "torch.Tensor | None", Any], Any]


class Run(Protocol):
    """Runs function(rows, base, local) over a block whose inputs are given as stored, and rounds the result to
    `out`."""

    def __call__(
        self,
        function: Elementwise,
        stored: tuple[torch.Tensor, ...],
        base: torch.Tensor | None,
        local: Any,
        dtype: torch.dtype,
        out: torch.dtype | None,
    ) -> Any:
        """rows are the inputs in `dtype`, less the base where there is one."""


def run_eagerly(
    function: Elementwise,
    stored: tuple[torch.Tensor, ...],
    base: torch.Tensor | None,
    local: Any,
    dtype: torch.dtype,
    out: torch.dtype | None,
) -> Any:
    """The reference: one operation after the other."""
    wide = None if base is None else base.to(dtype)
    rows = tuple(x.to(dtype) if wide is None else x.to(dtype) - wide for x in stored)
    result = function(rows, wide, local)
    return result if out is None else round_once(result, out)


Form = Any  # what is left of nested tuples when each tensor is replaced by its dtype and shape


def take_apart(value: Any, tensors: list[torch.Tensor]) -> Form:
    """The form of nested tuples of tensors, None and bool; the tensors are appended to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return value.dtype, tuple(value.shape)
    if isinstance(value, tuple):
        return type(value), *(take_apart(item, tensors) for item in value)
    return value


def put_together(form: Form, tensors: Iterator[torch.Tensor]) -> Any:
    """The value that `take_apart` took apart."""
    if not isinstance(form, tuple):
        return form
    kind, *items = form
    if isinstance(kind, torch.dtype):
        return next(tensors)
    values = [put_together(item, tensors) for item in items]
    return kind(*values) if hasattr(kind, "_fields") else tuple(values)


class Kernels:
    """A `Run` that uses compiled code where there is some: from the cache on disk, or compiled at first use.

    mode "auto" compiles what would take longer eagerly, over the `blocks` of the merge, than compiling takes. problems:
    why something could not be compiled. What is not compiled, or not yet, runs eagerly, with the same result.
    """

    def __init__(self, mode: Mode, blocks: int, block: int, threads: int) -> None:
        self.mode, self.blocks, self.block, self.threads = mode, blocks, block, threads
        self.problems = set[str]()
        self._kernels: dict[Fused, Callable[..., Any] | None] = {}
        self._lock = Lock()

    def __call__(
        self,
        function: Elementwise,
        stored: tuple[torch.Tensor, ...],
        base: torch.Tensor | None,
        local: Any,
        dtype: torch.dtype,
        out: torch.dtype | None,
    ) -> Any:
        if self.mode != "never" and len(stored[0]) == self.block:
            tensors: list[torch.Tensor] = []
            form = take_apart((stored, base, local), tensors)
            fused = Fused(function, form, dtype, out)
            with self._lock:
                first = fused not in self._kernels
                kernel = self._kernels.setdefault(fused, None)  # None: the other workers go on eagerly meanwhile
            if first:
                kernel = self._kernels[fused] = self._obtain(fused, tensors)
            if kernel is not None:
                return kernel(*tensors)
        return run_eagerly(function, stored, base, local, dtype, out)

    def _obtain(self, fused: Fused, tensors: list[torch.Tensor]) -> Callable[..., Any] | None:
        """The compiled function for tensors like these; None where it does not pay or cannot be had."""
        if sum(t.numel() >= self.block for t in tensors) > fused.inputs:
            return None  # coefficients for every element, as at a cut: rare
        try:
            if not fused.path.exists():
                if self.mode == "auto" and (
                    compiler() is None or self._eager_seconds(fused, tensors) < COMPILE_SECONDS
                ):
                    return None
                fused.compile(tensors)
            return fused.load(self.threads)
        except (RuntimeError, OSError, TypeError, AttributeError) as error:  # parts of torch that differ by release
            self.problems.add(f"{fused.function.__name__} was not compiled: {(str(error).splitlines() or [''])[0]}")
            return None

    def _eager_seconds(self, fused: Fused, tensors: list[torch.Tensor]) -> float:
        """How long all blocks would take, from one of them; the first, which warms the caches, is not counted."""
        fused(*tensors)
        started = time.perf_counter()
        fused(*tensors)
        return (time.perf_counter() - started) * self.blocks


def compiler() -> str | None:
    """The C++ compiler that inductor would call."""
    return shutil.which(os.environ.get("CXX", "g++"))


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mergekit_lfm" / "kernels"


@cache
def _environment() -> str:
    """Digest of all but the function that a compiled library depends on: our sources, torch, the processor."""
    package = Path(__file__).parent.parent
    sources = [path.read_bytes() for part in ("kernels", "methods") for path in sorted((package / part).glob("*.py"))]
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return xxhash.xxh3_128_hexdigest(b"\0".join([*sources, torch.__version__.encode(), flags.encode()]))


@dataclass(frozen=True)
class Fused:
    """An elementwise function with the form of its arguments: what one compiled library is for."""

    function: Elementwise
    form: Form
    dtype: torch.dtype
    out: torch.dtype | None

    @property
    def path(self) -> Path:
        """Where its library is kept."""
        name = f"{self.function.__module__}.{self.function.__qualname__}"
        facts = f"{_environment()} {name} {self.form} {self.dtype} {self.out}"
        return cache_folder() / f"{self.function.__name__}-{xxhash.xxh3_128_hexdigest(facts.encode())}.pt2"

    @property
    def inputs(self) -> int:
        """How many of the tensors are inputs, the base included; the others are coefficients."""
        _, stored, base, _ = self.form
        return len(stored) - 1 + (base is not None)

    def __call__(self, *tensors: torch.Tensor) -> Any:
        stored, base, local = put_together(self.form, iter(tensors))
        return run_eagerly(self.function, stored, base, local, self.dtype, self.out)

    def load(self, threads: int) -> Callable[..., Any]:
        """The library as a function of the tensors, for so many threads at once."""
        # What torch._inductor.package.load_package calls, without the 2 s that importing it takes.
        library = torch._C._aoti.AOTIModelPackageLoader(str(self.path), "model", False, threads, -1)
        single = self.out is not None

        def run(*tensors: torch.Tensor) -> Any:
            results = library.boxed_run(list(tensors))
            return results[0] if single else tuple(results)

        return run

    def compile(self, tensors: Sequence[torch.Tensor]) -> None:
        """Compile for tensors like these, and move the library to its place when it is whole."""
        from torch._inductor import aoti_compile_and_package  # 2 s, with dynamo

        fused = self

        class Step(torch.nn.Module):
            def forward(self, *tensors: torch.Tensor) -> Any:
                return fused(*tensors)

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own internals
            package = Path(folder) / "step.pt2"
            exported = torch.export.export(Step(), tuple(tensors))
            aoti_compile_and_package(exported, package_path=str(package), inductor_configs={"cpp.threads": 1})
            package.rename(self.path)
