"""Elementwise functions over a block, from the stored bytes to the stored bytes: eagerly, or compiled to one loop.

The bits are the same in both cases: the functions use only + - * /, comparisons and integer operations, and the
compiler may not contract or approximate them. Compiled (C++ with the CPU's vector instructions, by torch's inductor)
TIES takes 0.4 ms for 2^18 elements of three models, and eagerly 3 ms. Compiling takes 10 s in a separate process, while
the merge goes on eagerly; only large merges do it. Libraries are kept on disk, each with its digest in its name, in a
folder where nobody else can write; loading one takes 10 ms.
"""

from __future__ import annotations

import inspect
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
import xxhash

from mergekit_lfm.kernels import bits
from mergekit_lfm.kernels.inductor import compile_library, load_library
from mergekit_lfm.kernels.libraries import Libraries, compiler, instructions, keep
from mergekit_lfm.kernels.random import ranked_mask, ranked_sums
from mergekit_lfm.kernels.ranked import PAYS, RankedMasks
from mergekit_lfm.kernels.step import Elementwise, Form, Step, leaves_of, put_together, resize, run_eagerly, take_apart

Mode = Literal["auto", "always", "never"]
COMPILE_S = 10  # about what compiling one function takes
SHORTEST = 4  # blocks of up to a fourth of a whole one take less time eagerly than the whole one compiled


class Kernels:
    """A `Run` that uses compiled code if available: from the cache on disk, or compiled beside the merge.

    mode "auto" compiles functions that would take longer eagerly, over the `blocks` of the merge, than compiling takes,
    about `compile_s`; "always" compiles everything first. problems: why functions could not be compiled, or
    libraries on disk not be used. Functions not compiled, or not yet, run eagerly, with the same result. Use as a
    context manager: leaving it stops unfinished compilations. A block shorter than `block` is computed as part of one.
    """

    native = False

    def __init__(self, mode: Mode, blocks: int, block: int, threads: int, *, compile_s: float = COMPILE_S) -> None:
        self.mode, self.blocks, self.block, self.threads = mode, blocks, block, threads
        self.compile_s = compile_s
        self.problems = set[str]()
        self._kernels: dict[Fused, Callable[..., Any] | None] = {}
        self._compiling: dict[Fused, subprocess.Popen[bytes]] = {}
        self._lock = Lock()
        self._libraries = Libraries(self.problems)
        pays = mode == "always" or (blocks >= PAYS and compiler() is not None)
        masks = None if mode == "never" else RankedMasks(self._libraries, compiles=pays)
        self.ranked_mask = masks or ranked_mask
        self.ranked_sums = masks.with_sums if masks else ranked_sums

    def __enter__(self) -> Kernels:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._compiling.values():
            os.killpg(process.pid, signal.SIGKILL)  # with the C++ compiler that it may have started
            process.communicate()
        self._compiling.clear()
        self._libraries.close()

    def __call__(self, step: Step) -> Any:
        count = len(step.stored[0])
        if self.mode != "never" and self.block // SHORTEST < count <= self.block:
            tensors: list[torch.Tensor] = []
            form = resize(take_apart((step.stored, step.base, step.local), tensors), count, self.block)
            fused = Fused(step.function, form, step.dtype, step.out)
            with self._lock:
                first = fused not in self._kernels
                kernel = self._kernels.setdefault(fused, None)
                compiled = None if kernel else self._compiled(fused)
            if first:
                self._obtain(fused, tensors)
            elif compiled is not None:
                self._load_compiled(fused, compiled)
            kernel = kernel or self._kernels[fused]
            if kernel is not None:
                if count == self.block:
                    return kernel(*tensors)
                result = kernel(*[_lengthen(x, count, self.block) for x in tensors])
                return tuple(x[:count] for x in result) if isinstance(result, tuple) else result[:count]
        return run_eagerly(step)

    def _compiled(self, fused: Fused) -> subprocess.Popen[bytes] | None:
        """The process that compiled this function if it has ended; afterwards None."""
        process = self._compiling.get(fused)
        return self._compiling.pop(fused) if process is not None and process.poll() is not None else None

    def _obtain(self, fused: Fused, tensors: list[torch.Tensor]) -> None:
        """Load the function from the cache, or start to compile it if that pays."""
        if sum(shape == (self.block,) for _, shape in fused.leaves()) > fused.inputs:
            return  # a coefficient for every element, as at a cut: rare, unlike a row of them for each input
        library = self._libraries.find(fused.name, ".so")
        if library is not None:
            self._load(fused, library)
        elif self.mode == "always" or (
            compiler() is not None and self._eager_seconds(fused, tensors) >= self.compile_s
        ):
            process = fused.start_compiling(self._libraries.folder())
            if self.mode == "always":
                self._load_compiled(fused, process)
            else:
                with self._lock:
                    self._compiling[fused] = process

    def _load_compiled(self, fused: Fused, compiled: subprocess.Popen[bytes]) -> None:
        """Load the function's library, after the process that compiled it has ended."""
        message = compiled.communicate()[1].decode().strip() or "the compiler left no library"
        library = self._libraries.find(fused.name, ".so")
        if library is None:
            self.problems.add(f"{fused.function.__name__} runs without being compiled: {message.splitlines()[-1]}")
        else:
            self._load(fused, library)

    def _load(self, fused: Fused, library: Path) -> None:
        try:
            self._kernels[fused] = fused.load(library, self.threads)
        except (RuntimeError, OSError, TypeError, AttributeError) as error:  # parts of torch that differ by release
            library.unlink(missing_ok=True)  # the next run compiles it anew
            reason = (str(error) or type(error).__name__).splitlines()[-1]
            self.problems.add(f"{fused.function.__name__} runs without being compiled: {reason}")

    def _eager_seconds(self, fused: Fused, tensors: list[torch.Tensor]) -> float:
        """Estimated seconds for all blocks, from timing one; an untimed run before it warms the caches."""
        fused(*tensors)
        started = time.perf_counter()
        fused(*tensors)
        return (time.perf_counter() - started) * self.blocks / self.threads


def _lengthen(x: torch.Tensor, count: int, block: int) -> torch.Tensor:
    """A tensor of `count` elements, or of rows of these, with zeros up to the end of a whole block."""
    return torch.nn.functional.pad(x, (0, block - count)) if x.dim() and x.shape[-1] == count else x


@cache
def _environment(folder: Path) -> str:
    """Digest of a compiled library's dependencies: our sources, those in the function's folder, torch, the processor.

    The folder is another one for methods of other packages.
    """
    package = Path(__file__).parent.parent
    folders = dict.fromkeys((package / "kernels", package / "methods", folder))
    sources = [path.read_bytes() for each in folders for path in sorted(each.glob("*.py"))]
    return xxhash.xxh3_128_hexdigest(b"\0".join([*sources, torch.__version__.encode(), instructions().encode()]))


@dataclass(frozen=True)
class Fused:
    """An elementwise function with the form of its arguments: the content of one compiled library."""

    function: Elementwise
    form: Form
    dtype: torch.dtype
    out: torch.dtype | None

    @property
    def name(self) -> str:
        """The first part of its library's name; the library's own digest follows."""
        name = f"{self.function.__module__}.{self.function.__qualname__}"
        facts = (
            f"{_environment(Path(inspect.getfile(self.function)).parent)} {name} {self.form} {self.dtype} {self.out}"
        )
        return f"{self.function.__name__}-{xxhash.xxh3_128_hexdigest(facts.encode())}"

    @property
    def inputs(self) -> int:
        """The number of tensors that are inputs, base included; the others are coefficients."""
        _, stored, base, _ = self.form
        return len(stored) - 1 + (base is not None)

    def __call__(self, *tensors: torch.Tensor) -> Any:
        stored, base, local = put_together(self.form, iter(tensors))
        return run_eagerly(Step(self.function, stored, base, local, self.dtype, self.out))

    def leaves(self) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """The dtype and shape of every tensor that it takes."""
        return list(leaves_of(self.form))

    def load(self, library: Path, threads: int) -> Callable[..., Any]:
        """The library as a function of the tensors, usable by this many threads at once."""
        call, single = load_library(library, threads), self.out is not None

        def run(*tensors: torch.Tensor) -> Any:
            results = call(tensors)
            return results[0] if single else results

        return run

    def start_compiling(self, folder: Path) -> subprocess.Popen[bytes]:
        """Compile in another process: export and inductor keep global state, take 250 MB, and cannot be interrupted.

        folder: for the library. Inductor's own cache of compiled code, in /tmp by default, goes there, too.
        """
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), **os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        process = subprocess.Popen(
            [sys.executable, "-c", "from mergekit_lfm.kernels.compiled import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the merge, which ends this process itself
        )
        assert process.stdin is not None
        process.stdin.write(pickle.dumps((self, folder)))
        process.stdin.close()
        process.stdin = None
        return process

    def compile(self, place: Path) -> None:
        """Compile, and move the complete library to the folder `place`."""
        fused = self
        example: list[torch.Tensor] = [torch.zeros(shape, dtype=dtype) for dtype, shape in self.leaves()]

        class Module(torch.nn.Module):
            def forward(self, *tensors: torch.Tensor) -> Any:
                return fused(*tensors)

        with tempfile.TemporaryDirectory(dir=place) as folder:
            library = Path(folder) / "step.so"
            shutil.copyfile(compile_library(Module(), example), library)  # it may lie in a cache of the user's
            keep(library, place, self.name)


def main() -> None:
    """Compile the `Fused` that is pickled on standard input, with the folder for its library."""
    warnings.simplefilter("ignore")  # torch warns of its own internals
    torch.set_num_threads(1)
    bits.compiling = True
    fused, folder = pickle.load(sys.stdin.buffer)
    fused.compile(folder)
