"""Compare the time of merging data on a GPU with that of copying the same number of bytes there.

    python benchmarks/gpu_kernels.py                                # on the GPU: seconds
    python benchmarks/gpu_kernels.py --device cpu --numel 100000    # a smoke test on the processor, without kernels

Inputs are bfloat16 tensors of `--numel` elements, a base and three models near it. `copy` is a copy on the device that
moves as many bytes, read and written, as the row's operation has to; `ratio` is the operation's time with Triton's
kernels divided by the copy's, `torch` its time with torch's operations one after another. All are medians of
`--repeats`, in the chunks of `merge_tensors`. `benchmarks/merge_vs_copy.py --device cuda` measures files to files.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mergekit_lfm.engine.blocks import Blocks, apply_to
from mergekit_lfm.errors import PlanError
from mergekit_lfm.kernels.block import BLOCK, SEGMENT, Coefficients
from mergekit_lfm.kernels.gpu import GpuKernels
from mergekit_lfm.kernels.random import Coins
from mergekit_lfm.kernels.ranks import NONE, Largest, Ranks
from mergekit_lfm.kernels.reductions import L1, Gram, Reduction
from mergekit_lfm.kernels.selection import Bracket, Digits
from mergekit_lfm.kernels.sums import Weights
from mergekit_lfm.machine.accelerators import CHUNK, Gpu
from mergekit_lfm.machine.devices import find_device
from mergekit_lfm.methods.fisher import FisherAverage
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.methods.task_vectors import SparseSum

HALF = 0x3A300000  # about the median of |x| for x from N(0, 0.001), as the bits of a float32
RANKS = Ranks([(Largest(HALF, 0), NONE)] * 3)
COINS = Coins((1, 2, 3), (0.5, 0.5, 0.5))
THIRDS = (0.4, 0.3, 0.3)
PIVOTS = {(i, 0): [HALF + 20_000, HALF, HALF - 20_000] for i in range(3)}
MERGES: dict[str, tuple[str, bool, Coefficients]] = {
    "linear": ("linear", False, Weights(THIRDS)),
    "task_arithmetic": ("task_arithmetic", True, SparseSum(THIRDS, None, None, False, 1.0)),
    "ties": ("ties", True, SparseSum(THIRDS, RANKS, THIRDS, True, 1.0)),
    "dare_linear": ("dare_linear", True, SparseSum(THIRDS, COINS, None, False, 1.0)),
    "dare_ties": ("dare_ties", True, SparseSum(THIRDS, COINS, THIRDS, True, 1.0)),
    "fisher, of 1.5 models": ("fisher", False, FisherAverage([0.5], [0.0], [1.0])),
}
REDUCTIONS: dict[str, Reduction] = {
    "order statistics: bracket": Bracket(PIVOTS, 1 << 30),
    "order statistics: digits": Digits(15, 16),
    "Gram matrix": Gram(),
    "L1 norms": L1(RANKS),
}


@dataclass(frozen=True)
class Bench:
    """Data on a device, and the number of repetitions of each measurement."""

    rows: list[torch.Tensor]
    base: torch.Tensor
    repeats: int

    def blocks(self, kernels: GpuKernels, *, with_base: bool, rows: int = 3) -> Blocks:
        """The data as the engine's blocks."""
        readers = [lambda start, stop, x=x: x[start:stop] for x in self.rows[:rows]]
        base: Any = (lambda start, stop: self.base[start:stop]) if with_base else None
        gpu = Gpu(str(self.base.device))
        at_once = SEGMENT if kernels.native else CHUNK
        return Blocks(readers, base, len(self.base), BLOCK, torch.float32, kernels, gpu, at_once)

    def seconds(self, run: Callable[[], object]) -> float:
        """The median seconds of a run, after two that are not counted."""
        times = []
        for _ in range(self.repeats + 2):
            self._wait()
            started = time.perf_counter()
            run()
            self._wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times[2:])

    def _wait(self) -> None:
        if self.base.is_cuda:
            torch.cuda.synchronize(self.base.device)

    def copying(self, nbytes: int) -> float:
        """Seconds of a copy whose reads and writes together are `nbytes`."""
        source = torch.empty(nbytes // 2, dtype=torch.uint8, device=self.base.device)
        target = torch.empty_like(source)
        return self.seconds(lambda: target.copy_(source))


def make_bench(numel: int, device: torch.device, repeats: int) -> Bench:
    """A base from N(0, 0.02), and three models near it by N(0, 0.001)."""
    random = torch.Generator(device).manual_seed(0)
    base = (torch.randn(numel, generator=random, device=device) * 0.02).bfloat16()
    rows = [(base.float() + torch.randn(numel, generator=random, device=device) * 0.001).bfloat16() for _ in range(3)]
    return Bench(rows, base, repeats)


def merging(bench: Bench, name: str, kernels: GpuKernels) -> tuple[Callable[[], object], int]:
    """A function that merges the data, and the bytes that it has to move."""
    method, with_base, coefficients = MERGES[name]
    rows = 2 if method == "fisher" else 3
    blocks = bench.blocks(kernels, with_base=with_base, rows=rows)

    def run() -> None:
        for i in range(0, len(blocks), blocks.at_once):
            apply_to(blocks.load(i), METHODS[method], coefficients, torch.bfloat16)

    return run, (rows + with_base + 1) * bench.base.nbytes


def reducing(bench: Bench, name: str, kernels: GpuKernels) -> tuple[Callable[[], object], int]:
    """A function that reduces the deltas of the data, and the bytes that it has to move."""
    blocks = bench.blocks(kernels, with_base=True)
    return lambda: blocks.reduce(REDUCTIONS[name]), 4 * bench.base.nbytes


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="[default: cuda]")
    parser.add_argument("--numel", type=int, default=1 << 28, help="elements of each tensor [default: 2^28]")
    parser.add_argument("--repeats", type=int, default=9, help="[default: 9]")
    arguments = parser.parse_args()
    try:
        device = find_device(arguments.device)
    except PlanError as error:
        raise SystemExit(f"error: {error}") from None
    bench = make_bench(arguments.numel, device, arguments.repeats)
    native = GpuKernels("never" if device.type == "cpu" else "always", arguments.numel, device)
    plain = GpuKernels("never", arguments.numel, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the processor"
    rate = 2 * bench.base.nbytes / bench.copying(2 * bench.base.nbytes) / 1e9
    print(f"{name}, torch {torch.__version__}; {arguments.numel:,} elements; a copy moves {rate:,.0f} GB/s", end="\n\n")
    print("| operation | GB | copy ms | kernels ms | ratio | torch ms |")
    print("|---|--:|--:|--:|--:|--:|")
    for operation in (*MERGES, *REDUCTIONS):
        make = merging if operation in MERGES else reducing
        run, nbytes = make(bench, operation, native)
        copied, taken = bench.copying(nbytes), bench.seconds(run)
        eager = bench.seconds(make(bench, operation, plain)[0])
        cells = (f"{nbytes / 1e9:.2f}", *(f"{x * 1e3:.2f}" for x in (copied, taken)), f"{taken / copied:.2f}")
        print(f"| {' | '.join((operation, *cells, f'{eager * 1e3:.2f}'))} |", flush=True)
    for problem in sorted(native.problems):
        print(f"\n{problem}")


if __name__ == "__main__":
    main()
