"""Elementwise functions and sums on a GPU: eagerly by torch, or by Triton kernels with the same bits.

A kernel is made in a third of a second, from one tracing of the function, and Triton keeps it on disk; importing Triton
takes a second. So small merges run eagerly. If Triton is missing or unusable everything does, with a warning.
Kernels are compiled without contracting products and sums, and divide as IEEE 754 has it.
"""

from __future__ import annotations

import linecache
import subprocess
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from threading import Lock
from typing import Any

import torch

from mergekit_lfm.errors import reason
from mergekit_lfm.kernels.block import BLOCK
from mergekit_lfm.kernels.compiled import Fused, Kernels, Mode
from mergekit_lfm.kernels.emit import COUNT, PROGRAM, KernelText, Unsupported, emit
from mergekit_lfm.kernels.step import Step, resize, run_eagerly, take_apart
from mergekit_lfm.machine.accelerators import Accelerator

KERNELS_PAY = 1 << 28  # elements of a merge from which kernels pay
LEAST = 1 << 12  # elements of a block from which they do; other things of that size are not taken for blocks
_launching = Lock()  # a first launch calls Triton's compiler, which is not known to be thread-safe


class GpuKernels:
    """A `Run` for chunks on a device. native: True to use Triton's kernels, including hand-written ones.

    mode "auto" uses them if the merge has enough elements. problems: why they cannot be used.
    """

    def __init__(self, mode: Mode, numel: int, device: torch.device) -> None:
        self.problems = set[str]()
        self._unfit = set[Fused]()
        self.native = mode == "always" or (mode == "auto" and numel >= KERNELS_PAY)
        if self.native and (why := unusable(device)):
            self.problems.add(f"the GPU runs without kernels of Triton: {why}")
            self.native = False

    def __enter__(self) -> GpuKernels:
        return self

    def __exit__(self, *_: object) -> None:
        """No compiler processes to stop."""

    def __call__(self, step: Step) -> Any:
        if self.native and len(step.stored[0]) >= LEAST and (fused := _fused(step)) not in self._unfit:
            try:
                return kernel_of(fused)(step)
            except _failures() as error:
                self._unfit.add(fused)
                self.problems.add(f"{step.function.__name__} runs on the GPU without being compiled: {reason(error)}")
        result = run_eagerly(step)
        if step.flag is not None:
            results = result if isinstance(result, tuple) else (result,)
            looked_at = (*step.stored, *(() if step.base is None else (step.base,)), *results)
            step.flag.logical_or_(~torch.stack([x.isfinite().all() for x in looked_at]).all())
        return result


def make_kernels(accelerator: Accelerator, mode: Mode, numels: Sequence[int], threads: int) -> Kernels | GpuKernels:
    """The runner of elementwise functions on the device. numels: the elements of each tensor of the merge."""
    if accelerator.by_chunk:
        return GpuKernels(mode, sum(numels), accelerator.device)
    return Kernels(mode, sum(numel // BLOCK for numel in numels), BLOCK, threads)


def _failures() -> tuple[type[Exception], ...]:
    """The exceptions raised if a kernel cannot be built."""
    from triton.errors import TritonError

    return Unsupported, TritonError, subprocess.CalledProcessError


@cache
def unusable(device: torch.device) -> str:
    """Why Triton's kernels cannot be used on a device: they are missing or round differently; "" if they can."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(3, LEAST, generator=random) * torch.tensor([[1e-30], [1e9], [1.0]])
    step = Step(_delicate, tuple(rows), None, None, torch.float32, None)
    try:
        import triton

        there = replace(step, stored=tuple(row.to(device) for row in rows))
        found = torch.stack(kernel_of(_fused(there))(there)).cpu()
    except (ImportError, OSError, RuntimeError) as error:
        return reason(error)
    except _failures() as error:
        return reason(error)
    if torch.equal(found.view(torch.int32), torch.stack(run_eagerly(step)).view(torch.int32)):
        return ""
    return f"kernels of version {triton.__version__} round differently from the processor; 3.6 and newer do not"


def _delicate(rows: Sequence[torch.Tensor], _: torch.Tensor | None, __: Any) -> tuple[torch.Tensor, ...]:
    """Subnormal quotients; quotients; sums of products, which would differ if they were contracted."""
    return rows[0] / rows[1], rows[2] / rows[1], rows[2] * rows[2] + rows[2]


def _fused(step: Step) -> Fused:
    """The key of a kernel: the step's function and form, with the number of elements of the traced block."""
    form = resize(take_apart((step.stored, step.base, step.local), []), len(step.stored[0]), COUNT)
    return Fused(step.function, form, step.dtype, step.out)


def kernel_of(fused: Fused) -> Callable[[Step], Any]:
    """The kernel of a function whose form has COUNT elements, as a `Run`. Raises Unsupported."""
    with _launching:
        return _made(fused)


@cache
def _made(fused: Fused) -> Callable[[Step], Any]:
    source = source_of(fused)
    kernel = build(source.text, fused.function.__name__)

    def run(step: Step) -> Any:
        tensors: list[torch.Tensor] = []
        take_apart((step.stored, step.base, step.local), tensors)
        count, device = len(step.stored[0]), step.stored[0].device
        outputs = [torch.empty(count, dtype=dtype, device=device) for dtype in source.outputs]
        flag = torch.zeros(1, dtype=torch.int32, device=device) if step.flag is None else step.flag
        arguments = (*(x.contiguous() for x in tensors), *outputs, flag, count)
        launch(kernel, (-(-count // PROGRAM),), *arguments, BLOCK=PROGRAM)
        return outputs[0] if step.out is not None or len(outputs) == 1 else tuple(outputs)

    return run


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start a kernel on the device of its first argument, compiled without contracting products and sums."""
    device = arguments[0].device
    with _launching, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants, enable_fp_fusion=False)


def source_of(fused: Fused) -> KernelText:
    """The kernel's text, from a trace on the processor."""
    examples = [torch.zeros(shape, dtype=dtype, device="cpu") for dtype, shape in fused.leaves()]
    return emit(fused, examples, fused.inputs)


def build(text: str, name: str) -> Any:
    """The kernel with this source; Triton reads it again like a file."""
    file = f"<kernel {name} {hash(text):x}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    namespace: dict[str, Any] = {}
    exec(compile(text, file, "exec"), namespace)
    return namespace["kernel"]
