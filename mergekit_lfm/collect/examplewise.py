"""Squares of per-example gradients of any model, from one forward and backward pass of a whole batch.

The gradient of a parameter for one example follows from the input of the module that uses it and the gradient of its
output, which have a row for every example. All uses of a parameter are added before squaring. A model that mixes
examples, or uses parameters outside the modules that own them, runs one example at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mergekit_lfm.collect.linear import is_transposed
from mergekit_lfm.errors import PlanError

GRADIENTS_AT_ONCE = 1 << 22  # elements of per-example gradients in memory at a time
TRIED = 1 << 25  # the most elements of parameters on which both ways are compared at a time
TRIED_BYTES = 24  # per element: the sums of both ways and their difference, in float64
Parameters = Mapping[nn.Parameter, Sequence[Tensor]]  # each wanted parameter, with the sums to add its squares to


class NotSeparable(Exception):
    """The batch's gradients cannot be separated: its examples must run one by one."""


@dataclass(frozen=True)
class Call:
    """One call of a module on a batch: x, its only tensor, has a row for every example, and so has its output.

    version: of x when it was read. edge: the output in the graph, before anything could change it in place.
    """

    module: nn.Module
    x: Tensor
    version: int
    edge: GradientEdge
    again: Callable[[Tensor], Any]  # the same call on other rows

    @property
    def is_linear(self) -> bool:
        """True if the module is exactly a Linear or Conv1D: a subclass of Linear may do more."""
        return type(self.module) is nn.Linear or is_transposed(self.module)

    @property
    def is_embedding(self) -> bool:
        """True if the module only looks up rows of a table."""
        plain = type(self.module) is nn.Embedding
        return plain and self.module.max_norm is None and not self.module.scale_grad_by_freq


@contextmanager
def record_calls(modules: Sequence[nn.Module], n: int) -> Iterator[list[Call]]:
    """Record the calls of modules that take part in the gradient.

    Raises NotSeparable if a module does not map n rows to n rows. A module called with one row for all examples
    (position embeddings) returns n equal rows instead, so that every example has a gradient of its own.
    """
    calls: list[Call] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if not isinstance(output, Tensor) or len(inputs) != 1 or not output.dim() or not inputs[0].dim():
            raise NotSeparable
        (x,) = inputs
        if not len(x) == len(output) in (1, n):
            raise NotSeparable
        if not output.requires_grad:
            return output
        if len(output) != n:
            x, output = (t.expand(n, *t.shape[1:]).clone() for t in (x, output))
        again = partial(_call, module, args, kwargs)
        calls.append(Call(module, x.detach(), x._version, get_gradient_edge(output), again))
        return output

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> Any:
    """Call the module without its hooks, with x in place of the tensor among its arguments."""

    def substitute(value: Any) -> Any:
        return x if isinstance(value, Tensor) else value

    return module.forward(*map(substitute, args), **{name: substitute(value) for name, value in kwargs.items()})


def add_squares(wanted: Parameters, calls: Sequence[Call], scores: Iterator[Tensor]) -> None:
    """Add the squared gradient of every example's score to the parameters' sums, for each of the scores [n]."""
    uses: dict[nn.Parameter, list[tuple[int, str]]] = {}
    for i, call in enumerate(calls):
        if call.x._version != call.version:
            raise NotSeparable  # it was changed in place after it was read
        for name, parameter in call.module.named_parameters(recurse=False):
            if parameter in wanted:
                uses.setdefault(parameter, []).append((i, name))
    if not uses:
        return
    for score in scores:
        edges = [call.edge for call in calls]
        grads = torch.autograd.grad(score.sum(), edges, retain_graph=True, allow_unused=True)
        for parameter, call_names in uses.items():
            reached = [(calls[i], name, d) for i, name in call_names if (d := grads[i]) is not None]
            if reached:
                _add_parameter(parameter, wanted[parameter], reached)


def _add_parameter(parameter: nn.Parameter, sums: Sequence[Tensor], uses: list[tuple[Call, str, Tensor]]) -> None:
    if len(uses) == 1:
        call, name, d = uses[0]
        if call.is_linear and name == "weight" and call.x.dim() == 2:
            # An example's gradient is the outer product of d and x: its square is that of their squares.
            left, right = (call.x, d) if is_transposed(call.module) else (d, call.x)
            return _add(sums, _wide(left).square().T @ _wide(right).square())
        if call.is_embedding:
            return _add_touched_rows(sums, call, d)
    step = max(1, GRADIENTS_AT_ONCE // max(1, parameter.numel()))
    for begin in range(0, len(uses[0][2]), step):
        rows = slice(begin, begin + step)
        gradient = reduce(torch.add, (_gradients(call, name, d, rows) for call, name, d in uses))
        _add(sums, gradient.square_().sum(0))
    return None


def _add(sums: Sequence[Tensor], squares: Tensor) -> None:
    for total in sums:
        total += squares.to(total.device)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _add_touched_rows(sums: Sequence[Tensor], call: Call, d: Tensor) -> None:
    """Add an embedding's squares: only rows that the example looks up have gradients, summed per row, then squared."""
    keys, position = torch.unique(_table_rows(call, slice(None)), return_inverse=True)
    d = _row_gradients(call, d, slice(None))
    rows = d.new_zeros(len(keys), d.shape[-1]).index_add_(0, position, d).square_().double()
    for total in sums:
        total.index_add_(0, (keys % len(total)).to(total.device), rows.to(total.device))


def _table(call: Call) -> nn.Embedding:
    assert isinstance(call.module, nn.Embedding)
    return call.module


def _table_rows(call: Call, rows: slice) -> Tensor:
    """The table rows that some examples look up, as if each example had its own table: [examples * looked up]."""
    ids = call.x[rows]
    tables = _table(call).num_embeddings * torch.arange(len(ids), device=ids.device)
    return (ids.reshape(len(ids), -1) + tables[:, None]).reshape(-1)


def _row_gradients(call: Call, d: Tensor, rows: slice) -> Tensor:
    """The gradients of the looked-up rows, [examples * looked up, width]; 0 for padding, which gets no gradient."""
    gradients, padding = d[rows], _table(call).padding_idx
    if padding is not None:
        gradients = gradients.masked_fill((call.x[rows] == padding)[..., None], 0)
    return _wide(gradients.reshape(-1, d.shape[-1]))


def _gradients(call: Call, name: str, d: Tensor, rows: slice) -> Tensor:
    """The gradients of some examples through this use of the parameter, [examples, *shape], in float32 at least."""
    if call.is_linear:
        x, d = (_wide(t[rows].reshape(len(t[rows]), -1, t.shape[-1])) for t in (call.x, d))
        if name == "bias":
            return d.sum(1)
        return torch.bmm(x.mT, d) if is_transposed(call.module) else torch.bmm(d.mT, x)
    if call.is_embedding:
        shape = (len(d[rows]), *_table(call).weight.shape)
        tables = _wide(d[:0]).new_zeros(shape[0] * shape[1], shape[2])
        return tables.index_add_(0, _table_rows(call, rows), _row_gradients(call, d, rows)).view(shape)
    return torch.stack([_local_gradient(call, name, d, i) for i in range(len(d))[rows]])


def _local_gradient(call: Call, name: str, d: Tensor, i: int) -> Tensor:
    """The gradient of example i, from running the module once more on that example alone."""
    parameter: Tensor = getattr(call.module, name)
    output = call.again(call.x[i : i + 1])
    (gradient,) = torch.autograd.grad(output, parameter, d[i : i + 1], allow_unused=True)
    return _wide(torch.zeros_like(parameter) if gradient is None else gradient.detach())


def add_squares_singly(wanted: Parameters, scores: Iterator[Tensor]) -> None:
    """Add the squared gradients for the scores [1] of one example, by autograd: right for any model."""
    for score in scores:
        grads = torch.autograd.grad(score.sum(), list(wanted), retain_graph=True, allow_unused=True)
        for sums, grad in zip(wanted.values(), grads, strict=True):
            if grad is not None:
                _add(sums, grad.to_dense().double().square())


def gradients_agree(
    wanted: Sequence[nn.Parameter],
    together: Callable[[Parameters], None],
    apart: Callable[[Parameters], None],
    memory: int,
) -> bool:
    """True if both ways add the same up to rounding; tries them, in at most `memory` bytes."""
    differences: list[tuple[float, float, float]] = []
    try:
        for group in _group(wanted, min(TRIED, memory // TRIED_BYTES)):
            differences += _compare(group, together, apart)
    except (NotSeparable, PlanError, RuntimeError):  # the model does not take one row for each example
        return False
    # Gradients that are zero but for rounding (keys' biases) are compared with those of all other parameters, so that
    # the answer is the same for any memory.
    largest = max((size for _, size, _ in differences), default=0.0)
    return all(excess <= close * (size + 1e-3 * largest) for excess, size, close in differences)


def _group(wanted: Sequence[nn.Parameter], limit: int) -> Iterator[list[nn.Parameter]]:
    """The parameters in groups of at most this many elements, or of one parameter that has more."""
    group: list[nn.Parameter] = []
    for parameter in wanted:
        if group and sum(p.numel() for p in group) + parameter.numel() > limit:
            yield group
            group = []
        group.append(parameter)
    yield group


def _compare(
    group: Sequence[nn.Parameter], together: Callable[[Parameters], None], apart: Callable[[Parameters], None]
) -> Iterator[tuple[float, float, float]]:
    """For each parameter: how far the ways differ beyond rounding, its largest gradient, and the rounding tolerance."""
    totals = []
    for way in (together, apart):
        sums = {p: [torch.zeros(p.shape, dtype=torch.float64, device=p.device)] for p in group}
        way(sums)
        totals.append([total.sqrt_() for (total,) in sums.values()])
    for parameter, one, two in zip(group, *totals, strict=True):
        if parameter.numel():
            close = max(1e-3, 16 * torch.finfo(parameter.dtype).eps)
            size = float(two.max())
            yield float(one.sub_(two).abs_().sub_(two, alpha=close).max()), size, close
