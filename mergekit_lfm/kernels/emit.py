"""Elementwise functions as the source of one Triton kernel each: from the stored bytes to the stored bytes.

The function is traced once, to a graph of tensor operations, and each is written as the Triton operation that rounds
like it, at an index: slices and narrower views of integers change the index. So the kernel has the bits of the function
run eagerly, if it is compiled without contracting products and sums. A function without such a form raises
`Unsupported`, and runs eagerly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

COUNT = 2 * 65537  # elements of the traced block: a number that no other size equals
PROGRAM = 1024  # elements of a program, of 4 warps: 16 bytes of a 16-bit tensor for each thread
TYPES = {
    torch.float64: "tl.float64",
    torch.float32: "tl.float32",
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.int64: "tl.int64",
    torch.int32: "tl.int32",
    torch.bool: "tl.int1",
}
INFIX = {
    "add.Tensor": "+",
    "add_.Tensor": "+",
    "sub.Tensor": "-",
    "mul.Tensor": "*",
    "bitwise_and.Tensor": "&",
    "bitwise_and.Scalar": "&",
    "bitwise_or.Tensor": "|",
    "bitwise_or.Scalar": "|",
    "bitwise_xor.Tensor": "^",
    "eq.Tensor": "==",
    "eq.Scalar": "==",
    "ne.Tensor": "!=",
    "ne.Scalar": "!=",
    "gt.Tensor": ">",
    "gt.Scalar": ">",
    "lt.Tensor": "<",
    "lt.Scalar": "<",
}


class Unsupported(Exception):
    """The function has an operation without a Triton operation known to equal it bit for bit."""


@dataclass(frozen=True)
class KernelText:
    """A kernel's text. It takes the function's tensors, an output for each dtype, a flag, and the count."""

    text: str
    outputs: tuple[torch.dtype, ...]


def emit(function: Callable[..., Any], examples: Sequence[torch.Tensor], inputs: int) -> KernelText:
    """The kernel of a function of tensors, traced on examples of COUNT elements.

    The kernel sets the flag if the first `inputs` tensors or the results have a NaN or infinity.
    """
    graph = make_fx(function)(*examples).graph
    writer = _Writer()
    *_, output = graph.nodes
    results = output.args[0] if isinstance(output.args[0], list | tuple) else (output.args[0],)
    places = [node for node in graph.nodes if node.op == "placeholder"]
    for number, node in enumerate(places):
        writer.pointers[node] = f"p{number}"
    for node in places[:inputs]:
        writer.judge(writer.at(node, "i"), _dtype(node))
    for number, node in enumerate(results):
        if tuple(node.meta["val"].shape) != (COUNT,):
            raise Unsupported(f"a result of shape {list(node.meta['val'].shape)}")
        value = writer.at(node, "i")
        writer.judge(value, _dtype(node))
        writer.lines.append(f"tl.store(q{number} + i, {value}, mask=live)")
    outputs = tuple(_dtype(node) for node in results)
    names = [f"p{k}" for k in range(len(places))] + [f"q{k}" for k in range(len(outputs))]
    head = [
        "import triton",
        "import triton.language as tl",
        "",
        "",
        "@triton.jit",
        f"def kernel({', '.join(names)}, flag, count, BLOCK: tl.constexpr):",
    ]
    start = [
        "i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)",
        "live = i < count",
        "bad = i < 0",
    ]
    end = ["tl.atomic_or(flag + tl.zeros_like(i), tl.full((BLOCK,), 1, tl.int32), mask=bad & live, sem='relaxed')"]
    return KernelText("\n".join([*head, *(f"    {line}" for line in (*start, *writer.lines, *end)), ""]), outputs)


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


class _Writer:
    """The lines of a kernel. Each value is written once for each index at which it is used."""

    def __init__(self) -> None:
        self.pointers: dict[fx.Node, str] = {}
        self.lines: list[str] = []
        self.known: dict[tuple[fx.Node, str], str] = {}

    def at(self, node: Any, index: str, like: torch.dtype | None = None) -> str:
        """The name of a node's value at an index; a plain number becomes a constant of the dtype `like`."""
        if not isinstance(node, fx.Node):
            return _constant(node, like)
        if (node, index) not in self.known:
            self.known[node, index] = self.name(self._written(node, index))
        return self.known[node, index]

    def name(self, text: str) -> str:
        """A new name for a value."""
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return name

    def judge(self, value: str, dtype: torch.dtype) -> None:
        """Mark the elements where a float is NaN or infinite: there x - x is not 0."""
        if dtype.is_floating_point:
            wide = self.name(widen(value, dtype, torch.promote_types(dtype, torch.float32)))
            self.lines.append(f"bad = bad | (({wide} - {wide}) != 0)")

    def _written(self, node: fx.Node, index: str) -> str:
        if node.op == "placeholder":
            return self._loaded(node, (), index)
        name = str(node.target).removeprefix("aten.")
        write = getattr(self, f"_{name.split('.')[0].strip('_')}", None)
        if name in INFIX:
            return self._infix(node, index, INFIX[name])
        if write is None or node.kwargs.keys() - {"dtype", "device", "pin_memory"}:
            raise Unsupported(f"the operation {name}")
        text: str = write(node, index)
        return text

    def _loaded(self, node: fx.Node, chosen: tuple[int, ...], index: str) -> str:
        """Load an element of an argument: a tensor of all elements, a row of such a tensor, or one number."""
        shape, pointer = tuple(node.meta["val"].shape), self.pointers[node]
        row = f" + {chosen[0]} * count" if len(shape) == 2 and chosen else ""
        if shape[len(chosen) :] == (COUNT,) and len(shape) <= 2:
            return f"tl.load({pointer}{row} + ({index}), mask=live, other=0)"
        if len(shape) == len(chosen) <= 1 or (shape == (1,) and not chosen):
            return f"tl.load({pointer} + {chosen[0] if chosen else 0})"
        raise Unsupported(f"an argument of shape {list(shape)}")

    def _infix(self, node: fx.Node, index: str, sign: str) -> str:
        first, second = node.args
        if node.kwargs.get("alpha", 1) != 1:
            raise Unsupported("a sum with a factor")
        dtypes = [_dtype(x) for x in (first, second) if isinstance(x, fx.Node)]
        if len({*dtypes}) > 1:
            raise Unsupported(f"{sign} of {dtypes[0]} and {dtypes[1]}")
        return f"{self.at(first, index, dtypes[0])} {sign} {self.at(second, index, dtypes[0])}"

    def _rsub(self, node: fx.Node, index: str) -> str:
        return f"{_constant(node.args[1], _dtype(node))} - {self.at(node.args[0], index)}"

    def _div(self, node: fx.Node, index: str) -> str:
        first, second = (self.at(x, index, _dtype(node)) for x in node.args)
        return f"tl.div_rn({first}, {second})" if _dtype(node) == torch.float32 else f"{first} / {second}"

    def _rshift(self, node: fx.Node, index: str) -> str:
        return f"{self.at(node.args[0], index)} >> {_constant(node.args[1], _dtype(node))}"

    def _bitwise_not(self, node: fx.Node, index: str) -> str:
        if _dtype(node) == torch.bool:
            raise Unsupported("not of a bool")
        return f"{self.at(node.args[0], index)} ^ {_constant(-1, _dtype(node))}"

    def _abs(self, node: fx.Node, index: str) -> str:
        return f"tl.abs({self.at(node.args[0], index)})"

    def _sign(self, node: fx.Node, index: str) -> str:
        x, kind = self.at(node.args[0], index), TYPES[_dtype(node)]
        return f"({x} > 0).to({kind}) - ({x} < 0).to({kind})"

    def _clamp(self, node: fx.Node, index: str) -> str:
        if len(node.args) != 2:
            raise Unsupported("clamp from above")
        x, least = self.at(node.args[0], index), _constant(node.args[1], _dtype(node))
        return f"tl.where({x} < {least}, {least}, {x})"

    def _where(self, node: fx.Node, index: str) -> str:
        return f"tl.where({', '.join(self.at(x, index, _dtype(node)) for x in node.args)})"

    def _detach(self, node: fx.Node, index: str) -> str:
        return self.at(node.args[0], index)

    _alias = _clone = _detach  # the name in traces depends on torch's version

    def _select(self, node: fx.Node, index: str) -> str:
        source, axis, position = node.args
        assert isinstance(source, fx.Node) and isinstance(position, int)
        if source.op != "placeholder" or axis != 0 or position < 0:
            raise Unsupported("select from a computed tensor")
        return self._loaded(source, (position,), index)

    def _slice(self, node: fx.Node, index: str) -> str:
        source, axis, start, *end = node.args
        if axis or (end and len(end) > 1):
            raise Unsupported("slice by steps")
        return self.at(source, f"{index} + {start}" if start else index)

    def _arange(self, node: fx.Node, index: str) -> str:
        start = node.args[0] if len(node.args) > 1 else 0
        return f"({index} + {start}).to({TYPES[_dtype(node)]})"

    def _view(self, node: fx.Node, index: str) -> str:
        source, dtype = node.args
        assert isinstance(source, fx.Node)
        if not isinstance(dtype, torch.dtype):
            raise Unsupported("view of another shape")
        if dtype.itemsize == _dtype(source).itemsize:
            return f"{self.at(source, index)}.to({TYPES[dtype]}, bitcast=True)"
        if (_dtype(source), dtype) != (torch.int64, torch.int32):
            raise Unsupported(f"view of {_dtype(source)} as {dtype}")
        word = self.at(source, f"(({index}) >> 1)")  # little-endian: first the lower half
        return f"({word} >> ((({index}) & 1) * 32)).to(tl.int32)"

    def _to_copy(self, node: fx.Node, index: str) -> str:
        (source,) = node.args
        assert isinstance(source, fx.Node)
        value, before, after = self.at(source, index), _dtype(source), _dtype(node)
        if before == after or after == torch.float32 == torch.promote_types(before, after):
            return widen(value, before, after)
        if after == torch.bfloat16 and before == torch.float32:
            bits = self.name(f"{value}.to(tl.int32, bitcast=True)")
            even = self.name(f"({bits} + (({bits} >> 16) & 1) + 32767) >> 16")  # to nearest even; NaN may become 0
            numbers = self.name(f"tl.where({value} == {value}, {even}, 0x7FC0)")
            return f"{numbers}.to(tl.int16).to(tl.bfloat16, bitcast=True)"
        if before.itemsize == 8 and after.itemsize == 2:
            raise Unsupported(f"{before} as {after}, which rounds twice")
        return f"{value}.to({TYPES[after]})"


def widen(value: str, before: torch.dtype, after: torch.dtype) -> str:
    """A float in the same or a wider type. bfloat16 by its bits: Triton's interpreter loses subnormal ones."""
    if before == after:
        return value
    if (before, after) != (torch.bfloat16, torch.float32):
        return f"{value}.to({TYPES[after]})"
    return f"({value}.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)"


def _constant(value: Any, dtype: torch.dtype | None) -> str:
    """A number of this dtype as kernel source: plain numbers would be float32."""
    if dtype is None or not isinstance(value, int | float):
        raise Unsupported(f"the argument {value!r}")
    text = f'float("{value}")' if isinstance(value, float) and not math.isfinite(value) else repr(value)
    return f"tl.full((), {text}, {TYPES[dtype]})"
