"""A merge method's declaration: its parameters, and the pure functions reduce (requested by `solve`), solve and apply.

`solve` is a generator. It yields reductions (`kernels.reductions`), receives their values, and returns coefficients;
it sees nothing else of a tensor. So one method serves a tensor in memory, a tensor larger than memory, and a whole
model. `apply(rows, base, local)` is elementwise: from one block of the inputs and the coefficients for it, the merged
block.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mergekit_lfm.kernels.block import Coefficients, Elementwise

if TYPE_CHECKING:
    import torch

    from mergekit_lfm.kernels.reductions import Reduction

Value = bool | int | float | str | None


class Required:
    """The default of a required parameter."""

    def __repr__(self) -> str:
        return "required"


REQUIRED = Required()


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method: a recipe's key, a command's option, and a row of the method's page.

    `per_input`, for merges only: given for each input and each tensor; otherwise shared by all inputs of an output
    tensor. `doc` is a sentence without its capital and its full stop. `kind` "switch", for merges only, takes true,
    false or one of `choices`. `above` is an exclusive lower bound. `unset`: what a default of None stands for.
    `absolute`, for merges only: a number in the units of the weights, such as a threshold.
    """

    name: str
    default: Value | Required
    per_input: bool = False
    doc: str = field(kw_only=True)
    kind: Literal["float", "int", "bool", "str", "switch"] = "float"
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    unset: str = ""
    absolute: bool = False


@dataclass(frozen=True, slots=True)
class Unit:
    """The input of one `solve`: a tensor, or with `model` scope all tensors of a model laid end to end.

    numel: elements in all. shape: the tensor's, or () for a whole model.
    shared and inputs: the resolved parameters, the latter one mapping per input.
    keys: one 64-bit key per input for counter-based random numbers, from seed, tensor name and position in the recipe.
    double: blocks are float64.
    start: the tensor's elements before the unit, if it is some of the tensor's rows (`Method.by_row`).
    norms: if the method's kind of `statistics` has a norm, the Euclidean norm of each input's over its model.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    shared: Mapping[str, Value]
    inputs: Sequence[Mapping[str, Value]]
    keys: tuple[int, ...]
    double: bool = False
    start: int = 0
    norms: tuple[float, ...] = ()

    def floats(self, name: str) -> list[float]:
        """The per-input parameter `name`, one number per input."""
        return [float(values[name]) for values in self.inputs]  # type: ignore[arg-type]

    def number(self, name: str) -> float:
        """The shared parameter `name` as a number."""
        return float(self.shared[name])  # type: ignore[arg-type]


class Matrices(Protocol):
    """One tensor of n models, or one linear layer with its bias as the last column, as matrices in float64."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrices."""

    def matrix(self, i: int, start: int, stop: int) -> torch.Tensor:
        """Rows start .. stop of input i's matrix, or of its delta to the base if there is one, in fresh memory."""

    def base(self, start: int, stop: int) -> torch.Tensor:
        """Rows start .. stop of the base's matrix, in fresh memory."""

    def gram(self, i: int, start: int, stop: int) -> torch.Tensor:
        """Rows start .. stop of input i's Gram matrix, mean of x x^T, [stop - start, columns] in fresh memory."""


def as_matrix(unit: Unit) -> tuple[int, int] | None:
    """The shape of a tensor that is a matrix; None for another."""
    return (unit.shape[0], unit.shape[1]) if len(unit.shape) == 2 else None


@dataclass(frozen=True, slots=True)
class Whole:
    """How a method merges tensors as whole matrices.

    merge: yields the merged matrices [rows, columns], float64, of tensors that have equal parameters and, if the method
    takes Gram matrices, share these. nbytes(unit, rows, columns): the memory that this takes for the largest of them.
    view(unit): the shape (rows, columns) in which the method sees a tensor; None leaves it to `solve` and `apply`.
    """

    merge: Callable[[Unit, Sequence[Matrices]], Iterator[torch.Tensor]]
    nbytes: Callable[[Unit, int, int], int]
    view: Callable[[Unit], tuple[int, int] | None] = as_matrix


Solve = Callable[[Unit], "Generator[Reduction, Any, Coefficients]"]


def immediate(solve: Callable[[Unit], Coefficients]) -> Solve:
    """A `solve` that needs no reduction, from a plain function."""

    @wraps(solve)
    def generator(unit: Unit) -> Generator[Reduction, Any, Coefficients]:
        return solve(unit)
        yield  # makes this a generator: one that asks for nothing

    return generator


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method.

    base: "required" or "optional" (then deltas to it are merged and it is not itself an input), "member" (an input like
    the others), "first" (required, and the first input). inputs: least and most number of inputs, None for any
    number. scope(shared): "tensor", or "model" for one solve over all tensors. row(unit): blocks are whole rows of this
    many elements. by_row(unit): true if the result for a row depends on that row alone; a solve then sees some rows at
    a time. sums(unit): how many numbers its sums by row or column are. joint: true if a sum is of quantities that come
    from all inputs together (`kernels.derived`), so that it needs all of a block at once. copies(unit): true if the
    result is the only input, byte for byte. version: raised when results change. statistics: the kind of statistics
    that each input needs; the base is then a "member". Elementwise methods see them as further rows: those of the n
    inputs, then their n statistics. Tensors without statistics are averaged.
    homogeneous: false if the inputs times a factor do not give the result times it, as with a softmax of the weights.
    whole: for methods that merge tensors as matrices: those that it has a view of, and with `statistics` "gram" the
    linear layers that have these. A plan in which it would merge no matrix is an error.
    """

    name: str
    source: str
    summary: str
    parameters: tuple[Parameter, ...]
    base: Literal["required", "optional", "member", "first"]
    inputs: tuple[int, int | None]
    solve: Solve
    apply: Elementwise
    version: int = 1
    random: bool = False
    homogeneous: bool = True
    scope: Callable[[Mapping[str, Value]], str] = field(default=lambda _: "tensor")
    row: Callable[[Unit], int | None] = field(default=lambda _: None)
    by_row: Callable[[Unit], bool] = field(default=lambda _: False)
    sums: Callable[[Unit], int] = field(default=lambda _: 0)
    joint: bool = False
    copies: Callable[[Unit], bool] = field(default=lambda _: False)
    statistics: str | None = None
    whole: Whole | None = None
