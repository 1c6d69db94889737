"""A pretended GPU: tensors that say that they are on another device, and hold their numbers on the CPU.

Operations that mix devices raise as in CUDA; all others compute on the CPU, so that results are the same to the bit,
except for operations such as attention, which torch does in other steps on other devices. Values are real, unlike those
of torch's FakeTensorMode, so whole runs work. The device's name is "meta", which every torch has; torch built without
CUDA refuses most operations on "cuda".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from mergekit_lfm.views.maps import CPU

GPU = torch.device("meta")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
# CUDA takes indices of the CPU, too; the CPU takes none of a GPU.
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
PRODUCTS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1}  # which argument is the left factor
HEAVY = {"mm", "bmm", "addmm", "_linalg_svd", "linalg_cholesky_ex", "cholesky_solve"}


class OnGpu(Tensor):
    """A tensor on the pretended GPU."""

    held: Tensor
    is_meta = False  # it has numbers, unlike a real tensor on "meta"

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        place = {"strides": held.stride(), "storage_offset": held.storage_offset(), "device": GPU}
        with torch.inference_mode(False):  # views of tensors made outside of it are not inference tensors
            made = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, **place)  # type: ignore[attr-defined]
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{func} outside of `pretended_gpu`")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGpu({self.held})"


class _Sent(TorchFunctionMode):
    """torch.tensor makes tensors without numbers for the device; this makes them on the CPU and sends them there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and (place := kwargs.get("device")) is not None:
            return func(*args, **{**kwargs, "device": None}).to(place)
        return func(*args, **kwargs)


class PretendedGpu(TorchDispatchMode):
    """While entered, GPU is a device of the thread. there, here: the operations called on it and on the CPU.

    backwards: products there are added up from the end on, so that they are rounded otherwise.
    """

    def __init__(self, backwards: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.backwards = backwards
        self.there, self.here = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # torch leaves it to us to take some operations apart
            with self:
                taken_apart = func.decompose(*args, **kwargs)
            if taken_apart is not NotImplemented:
                return taken_apart
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in tensors if isinstance(x, OnGpu)]
        allowed = func in COPIES or (func in INDEXING and isinstance(args[0], OnGpu))
        if there and not allowed and any(x.dim() and not isinstance(x, OnGpu) for x in tensors):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} was given both")
        place = kwargs.get("device")
        on_gpu = bool(there) if place is None else torch.device(place) == GPU
        (self.there if on_gpu else self.here)[func.overloadpacket.__name__] += 1
        given = kwargs if place is None else {**kwargs, "device": CPU}
        inner, options = tree_map_only(OnGpu, lambda x: x.held, (args, given))
        if on_gpu and self.backwards and func in PRODUCTS:
            i = PRODUCTS[func]
            inner = (*inner[:i], inner[i].flip(-1), inner[i + 1].flip(-2))
        with _disable_current_modes():
            out = func(*inner, **options)
        if func is aten.copy_.default:
            return args[0]
        if not on_gpu:
            return out
        out = tree_map_only(Tensor, OnGpu, out)
        aliased = there and not torch.is_inference_mode_enabled()
        return return_and_correct_aliasing(func, args, kwargs, out) if aliased else out  # type: ignore[no-untyped-call]


@contextmanager
def pretended_gpu(*, backwards: bool = False) -> Iterator[PretendedGpu]:
    """The mode, entered; modules that move keep their ties between parameters, as on a real GPU."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with _Sent(), PretendedGpu(backwards) as gpu:
            yield gpu
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@contextmanager
def one_after_another(*_: object) -> Iterator[Callable[..., Iterable[Any]]]:
    """A replacement for `one_thread_each`: a mode of torch is in force only in the thread that enters it."""
    yield map


def on_cpu(*tensors: Tensor) -> bool:
    """True if no tensor is on the pretended GPU."""
    return all(type(x) is Tensor and x.device == CPU for x in tensors)
