"""Coins that depend on ranks, by compiled code: 4 ns for an entry of a bfloat16 model's delta, 8 for one of all digits.

numpy takes 12 ns or more, and is there where no compiler is. The source, `ranked.cpp`, is compiled in half a second.

The same code adds up magnitudes where no sum of some of them rounds, so that every order gives torch's result: those of
changes of 16-bit models. Where one might round, torch adds them up.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Lock

import torch
import xxhash

from mergekit_lfm.kernels.bits import sums_of_magnitudes
from mergekit_lfm.kernels.block import Block
from mergekit_lfm.kernels.libraries import Libraries, compiler, instructions, keep
from mergekit_lfm.kernels.random import ranked_mask, ranked_sums

SOURCE = Path(__file__).with_suffix(".cpp")
OPTIONS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")
LONGEST = 1 << 16  # elements of a row; longer ones have too many entries in a slot, and numpy takes less time
PAYS = 64  # blocks of a merge of three models, from which on compiling takes less time than it saves

Sums = torch.Tensor | None  # None if they might depend on the order
Native = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], tuple[torch.Tensor, Sums]]


class RankedMasks:
    """`ranked_mask` by compiled code if it is on disk, or if there is a compiler and it pays; with the same result."""

    def __init__(self, libraries: Libraries, *, compiles: bool) -> None:
        self.libraries, self.compiles = libraries, compiles
        self._lock, self._sought = Lock(), False
        self._native: Native | None = None

    def __call__(self, key: torch.Tensor, x: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
        native = self._find(x.dtype, limits)
        return ranked_mask(key, x, limits) if native is None else native(key, x, None, limits)[0]

    def with_sums(
        self, key: torch.Tensor, block: Block, i: int, limits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`ranked_sums`, likewise; bfloat16 is read as it is stored."""
        native, stored, base = self._find(block.dtype, limits), block.stored[i], block.stored_base
        if native is None:
            return ranked_sums(key, block, i, limits)
        if base is not None and stored.dtype == base.dtype == torch.bfloat16:
            mask, sums = native(key, stored, base, limits)
        else:
            mask, sums = native(key, block.row(i), None, limits)
        return mask, sums_of_magnitudes(block.row(i), mask) if sums is None else sums

    def _find(self, dtype: torch.dtype, limits: torch.Tensor) -> Native | None:
        """The compiled code, if it is there and does this."""
        if dtype != torch.float32 or len(limits) > LONGEST:
            return None
        with self._lock:
            if not self._sought:
                self._native, self._sought = self._obtain(), True
        return self._native

    def _obtain(self) -> Native | None:
        name = f"ranked-{xxhash.xxh3_128_hexdigest(SOURCE.read_bytes() + f'{OPTIONS} {instructions()}'.encode())}"
        library = self.libraries.find(name, ".so")
        try:
            if library is None and self.compiles:
                compile_source(self.libraries.folder(), name)
                library = self.libraries.find(name, ".so")
            return None if library is None else load(library)
        except (subprocess.CalledProcessError, OSError) as error:
            output = error.stderr.decode() if isinstance(error, subprocess.CalledProcessError) else ""
            reason = (output.strip() or str(error)).splitlines()[-1]
            self.libraries.problems.add(f"ranked_mask runs without being compiled: {reason}")
            return None


def compile_source(folder: Path, name: str) -> None:
    """Compile the source, and move the complete library to the folder."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        library = Path(temporary) / "ranked.so"
        command = [compiler() or "g++", *OPTIONS, "-o", str(library), str(SOURCE)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        keep(library, folder, name)


def load(library: Path) -> Native:
    """The library as a function of float32, or of bfloat16 and a base of it, in the processor's memory."""
    function = ctypes.CDLL(str(library)).ranked_mask
    pointer = ctypes.c_void_p
    function.argtypes = [pointer, pointer, ctypes.c_int64, ctypes.c_uint32, ctypes.c_uint64, *[pointer] * 4]
    function.restype = ctypes.c_bool

    def run(
        key: torch.Tensor, x: torch.Tensor, base: torch.Tensor | None, limits: torch.Tensor
    ) -> tuple[torch.Tensor, Sums]:
        row = len(limits)
        mask, scratch = torch.empty(len(x), dtype=torch.int8), torch.empty(5 * row + 1, dtype=torch.int32)
        sums = torch.empty(2, dtype=torch.float64)
        state = int(key) & 0xFFFFFFFFFFFFFFFF
        pointers = limits.data_ptr(), scratch.data_ptr(), mask.data_ptr(), sums.data_ptr()
        origin = None if base is None else base.data_ptr()
        exact = function(x.data_ptr(), origin, len(x) // row, row, state, *pointers)
        return mask, sums if exact else None

    return run
