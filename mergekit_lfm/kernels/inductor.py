"""Libraries that torch's inductor compiled ahead of time, called by their C interface.

torch's own loader holds Python's lock while a library runs, so that threads take turns; ctypes lets go of it. The
interface is the one that torch keeps stable between releases (torch/csrc/inductor/aoti_runtime/interface.h).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Tensors = tuple[torch.Tensor, ...]

# torch hands pointers to tensors over in capsules without a name.
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


def compile_library(module: torch.nn.Module, example: list[torch.Tensor]) -> Path:
    """The shared library of a module that has no weights, for one thread, with every operation rounded as in torch.

    Call it in a process that compiles nothing else.
    """
    from torch._inductor import aot_compile

    _load_at_once()
    exact = {"cpp.enable_floating_point_contract_flag": "off", "cpp.enable_unsafe_math_opt_flag": False}
    exported = torch.export.export(module, tuple(example))
    library = aot_compile(exported.module(), tuple(example), options={"cpp.threads": 1, **exact})
    assert isinstance(library, str)
    return Path(library)


def _load_at_once() -> None:
    """Make inductor write the loads of `at_once`; nothing is changed where this torch has no such lines."""
    from torch._inductor.codegen import cpp

    kernel = getattr(cpp, "CppVecKernel", None)
    load_line: Callable[..., str] | None = getattr(kernel, "_get_vec_load_line", None)
    if kernel is None or load_line is None:
        return

    def faster(self: Any, *args: Any, **options: Any) -> str:
        line = load_line(self, *args, **options)
        return at_once(line) if str(self.vec_isa) == "avx2" else line

    kernel._get_vec_load_line = faster


def at_once(line: str) -> str:
    """inductor's line that loads eight numbers for AVX2, as one instruction if they are of 16 bits or integers.

    torch copies these to memory in two parts and loads the whole from there, which the processor cannot do before both
    are written: `apply` of DELLA takes 10 ns for an element in place of 2 (torch 2.13; AVX-512 has no such copies).
    """
    found = re.fullmatch(r"(at::vec::Vectorized<(.*)>)::loadu\((.*), (static_cast<int64_t>\(8L?\)|8L?)\)", line)
    if found is None:
        return line
    vector, kind, place = found[1], found[2], found[3]
    if kind == "int32_t":
        return f"{vector}::loadu({place})"
    if kind in ("at::BFloat16", "at::Half"):
        half = f"_mm_loadu_si128(reinterpret_cast<const __m128i*>({place}))"
        return f"{vector}(_mm256_zextsi128_si256({half}))"
    return line


def load_library(path: Path, threads: int) -> Callable[[Tensors], Tensors]:
    """The library as a function of tensors, for this many threads at once.

    Raises OSError or AttributeError for another file, and RuntimeError if the library reports an error.
    """
    from torch._C import _aoti

    library = ctypes.CDLL(str(path))
    create, run = library.AOTInductorModelContainerCreateWithDevice, library.AOTInductorModelContainerRun
    count = library.AOTInductorModelContainerGetNumOutputs
    pointer, number = ctypes.c_void_p, ctypes.c_size_t
    create.argtypes = [ctypes.POINTER(pointer), number, ctypes.c_char_p, ctypes.c_char_p]
    run.argtypes = [pointer, ctypes.POINTER(pointer), number, ctypes.POINTER(pointer), number, pointer, pointer]
    count.argtypes = [pointer, ctypes.POINTER(number)]
    container, outputs = pointer(), number()
    _check(create(ctypes.byref(container), threads, b"cpu", None), path)
    _check(count(container, ctypes.byref(outputs)), path)

    def call(tensors: Tensors) -> Tensors:
        capsules = _aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))  # the library frees these
        given = (pointer * len(capsules))(*(_pointer(each, None) for each in capsules))
        results = (pointer * outputs.value)()
        _check(run(container, given, len(given), results, len(results), None, None), path)
        return tuple(_aoti.alloc_tensors_by_stealing_from_void_ptrs([_capsule(each, None, None) for each in results]))

    return call


def _check(code: int, path: Path) -> None:
    if code:
        raise RuntimeError(f"{path.name} ended with error {code}")
