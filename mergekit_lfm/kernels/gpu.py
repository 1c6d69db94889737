"""Elementwise functions and sums on a GPU: eagerly by torch, or by Triton kernels with the same bits.

A kernel is made in a third of a second, from one tracing of the function, and Triton keeps it on disk; importing Triton
takes a second. So small merges run eagerly. Where Triton is missing or cannot be used everything does, and says so.
Kernels are compiled without contracting products and sums, and divide as IEEE 754 has it.
"""

from __future__ import annotations

import linecache
import subprocess
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from threading import Lock
from typing import Any

import torch

from mergekit_lfm.devices import reason
from mergekit_lfm.kernels.emit import BLOCK, COUNT, Source, Unsupported, emit
from mergekit_lfm.kernels.fused import Form, Fused, Mode, Step, run_eagerly, take_apart

WORTH = 1 << 28  # elements of a merge from which kernels pay
LEAST = (
    1 << 12
)  # elements of a block from which they do; below, sizes of other things could be taken for that of blocks
_launching = Lock()  # Triton's compiler, which a first launch calls, is not known to bear several threads


class GpuKernels:
    """A `Run` for chunks on a device. native: whether Triton's kernels are used, those written by hand among them.

    mode "auto" uses them where the merge has enough elements. problems: why they cannot be used.
    """

    def __init__(self, mode: Mode, numel: int, device: torch.device) -> None:
        self.problems = set[str]()
        self._kernels: dict[Fused, Callable[[Step], Any] | None] = {}
        self._lock = Lock()
        self.native = (mode == "always" or (mode == "auto" and numel >= WORTH)) and self._usable(device)

    def __enter__(self) -> GpuKernels:
        return self

    def __exit__(self, *_: object) -> None:
        """There is nothing to end."""

    def __call__(self, step: Step) -> Any:
        kernel = self._kernel(step) if self.native and len(step.stored[0]) >= LEAST else None
        if kernel is not None:
            return kernel(step)
        result = run_eagerly(step)
        if step.flag is not None:
            results = result if isinstance(result, tuple) else (result,)
            looked_at = (*step.stored, *(() if step.base is None else (step.base,)), *results)
            step.flag.logical_or_(~torch.stack([x.isfinite().all() for x in looked_at]).all())
        return result

    def _usable(self, device: torch.device) -> bool:
        """Whether a kernel that does next to nothing can be made and run."""
        step = Step(_as_it_is, (torch.ones(LEAST, device=device),), None, None, torch.float32, None)
        try:
            _kernel_of(_fused(step))(step)
        except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
            self.problems.add(f"the GPU runs without kernels of Triton: {reason(error)}")
            return False
        return True

    def _kernel(self, step: Step) -> Callable[[Step], Any] | None:
        """The kernel for steps of this form, made when the first comes; None where there can be none."""
        fused = _fused(step)
        with self._lock:
            if fused not in self._kernels:
                try:
                    self._kernels[fused] = _kernel_of(fused)
                except Unsupported as error:
                    self._kernels[fused] = None
                    self.problems.add(f"{step.function.__name__} runs on the GPU without being compiled: {error}")
            return self._kernels[fused]


def _as_it_is(rows: Sequence[torch.Tensor], _: torch.Tensor | None, __: Any) -> torch.Tensor:
    return rows[0] + 0.0


def _fused(step: Step) -> Fused:
    """What a kernel is for: the step's function and form, with as many elements as are traced."""
    form = _as_traced(take_apart((step.stored, step.base, step.local), []), len(step.stored[0]))
    return Fused(step.function, form, step.dtype, step.out)


def _as_traced(form: Form, count: int) -> Form:
    """The form with the number of elements of a block replaced by that of the traced one."""
    if not isinstance(form, tuple):
        return form
    if isinstance(form[0], torch.dtype):
        return form[0], tuple(COUNT if size == count else size for size in form[1])
    return form[0], *(_as_traced(item, count) for item in form[1:])


def _kernel_of(fused: Fused) -> Callable[[Step], Any]:
    """The kernel of a function whose form has COUNT elements, as a `Run`."""
    source = source_of(fused)
    kernel = build(source.text, fused.function.__name__)

    def run(step: Step) -> Any:
        tensors: list[torch.Tensor] = []
        take_apart((step.stored, step.base, step.local), tensors)
        count, device = len(step.stored[0]), step.stored[0].device
        outputs = [torch.empty(count, dtype=dtype, device=device) for dtype in source.outputs]
        flag = torch.zeros(1, dtype=torch.int32, device=device) if step.flag is None else step.flag
        arguments = (*(x.contiguous() for x in tensors), *outputs, flag, count)
        launch(kernel, (-(-count // BLOCK),), *arguments, BLOCK=BLOCK)
        return outputs[0] if step.out is not None or len(outputs) == 1 else tuple(outputs)

    return run


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start a kernel where its first argument lies, compiled so that no product and sum are contracted."""
    device = arguments[0].device
    with _launching, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants, enable_fp_fusion=False)


def source_of(fused: Fused) -> Source:
    """The kernel's text, from a trace on the processor."""
    examples = [torch.zeros(shape, dtype=dtype, device="cpu") for dtype, shape in fused.leaves()]
    return emit(fused, examples, fused.inputs)


def build(text: str, name: str) -> Any:
    """The kernel of this text; Triton reads it again as if it were a file."""
    file = f"<kernel {name} {hash(text):x}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    found: dict[str, Any] = {}
    exec(compile(text, file, "exec"), found)
    return found["kernel"]
