"""A call of an elementwise function on a block, with its tensors apart from the rest so that it can be compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergekit_lfm.kernels.sums import round_once

Elementwise = Callable[[Sequence[torch.Tensor], "torch.Tensor | None", Any], Any]


@dataclass(frozen=True)
class Step:
    """function(rows, base, local) over a block of inputs in their stored dtypes.

    rows are the inputs in `dtype`, minus the base if there is one; the result is rounded to `out` if that is a dtype.
    flag: [1] on a device; set there if an input or the result is not finite.
    """

    function: Elementwise
    stored: tuple[torch.Tensor, ...]
    base: torch.Tensor | None
    local: Any
    dtype: torch.dtype
    out: torch.dtype | None
    flag: torch.Tensor | None = None


RunStep = Callable[[Step], Any]


def run_eagerly(step: Step) -> Any:
    """Run the step one torch operation after the other: the reference for compiled code."""
    wide = None if step.base is None else step.base.to(step.dtype)
    rows = tuple(x.to(step.dtype) if wide is None else x.to(step.dtype) - wide for x in step.stored)
    result = step.function(rows, wide, step.local)
    return result if step.out is None else round_once(result, step.out)


Form = Any  # nested tuples with each tensor replaced by its dtype and shape


def take_apart(value: Any, tensors: list[torch.Tensor]) -> Form:
    """The form of nested tuples of tensors, None and bool; appends the tensors to `tensors`."""
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


def resize(form: Form, count: int, size: int) -> Form:
    """The form with `size` in place of `count`, the number of elements of a block."""
    if not isinstance(form, tuple):
        return form
    if isinstance(form[0], torch.dtype):
        return form[0], tuple(size if each == count else each for each in form[1])
    return form[0], *(resize(item, count, size) for item in form[1:])


def leaves_of(form: Form) -> Iterator[tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and shape of each tensor of a form, in order."""
    if isinstance(form, tuple):
        if isinstance(form[0], torch.dtype):
            yield form
        else:
            for item in form[1:]:
                yield from leaves_of(item)
