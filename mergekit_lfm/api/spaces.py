"""The changes of one module by several adapters, merged by a method in one of three spaces, and factored again.

A change is a product of small matrices. The method sees the products themselves, in panels that are made as it reads
them; or, in `knots` and `core`, their coordinates in bases that they share. A module that an adapter leaves alone is a
change of zero. A merge that is a weighted sum is one of the factors, in every space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce

import torch

from mergekit_lfm.api.tensors import unit_of
from mergekit_lfm.artifacts.transform import PANEL
from mergekit_lfm.engine.blocks import Blocks, apply_to, run_solve
from mergekit_lfm.errors import PlanError
from mergekit_lfm.kernels.block import Coefficients
from mergekit_lfm.kernels.products import (
    Fitted,
    Limit,
    Product,
    add_products,
    core_space,
    factor,
    fit,
    knots,
    multiply,
)
from mergekit_lfm.kernels.random import key
from mergekit_lfm.kernels.sums import Weights, weighted_sum
from mergekit_lfm.methods.method import Method, Unit
from mergekit_lfm.methods.task_vectors import SparseSum
from mergekit_lfm.methods.task_vectors import apply as sparse_sum
from mergekit_lfm.plan.job import block_numel
from mergekit_lfm.recipe.parts import Settings

Read = Callable[[int, int], torch.Tensor | None]  # rows of a matrix, from the first up to the last; None: zeros


@dataclass(frozen=True)
class ModuleMerge:
    """How the changes of one module are merged. name: of its weight, for random numbers and messages."""

    method: Method
    name: str
    settings: Settings
    space: str
    limit: Limit
    seed: int

    def unit(self, shape: tuple[int, ...], *, double: bool) -> Unit:
        return unit_of(self.name, self.settings, shape, self.seed, double=double)


def merge_products(module: ModuleMerge, products: Sequence[Product | None]) -> Fitted:
    """The merged change of a module, from that of each adapter; None is a change of zero.

    Without a limit it is exact where it is one of the factors; a matrix gets the largest rank of the adapters.
    """
    dtype = reduce(torch.promote_types, (product.a.dtype for product in products if product is not None))
    products = [product and Product(product.b.to(dtype), product.a.to(dtype)) for product in products]
    held = [product for product in products if product is not None]
    shape = held[0].b.shape[0], held[0].a.shape[1]
    if module.space == "product":
        unit = module.unit(shape, double=dtype == torch.float64)
        merged = _merge(module.method, unit, [_Panels(shape, _read(product), dtype) for product in products])
        if isinstance(merged, torch.Tensor):
            largest = Limit(max(product.rank for product in held))
            limit = module.limit if module.limit != Limit() else largest
            return factor(merged, limit, key(module.seed, module.name, len(products)))
    else:
        coordinates, back = _shared_basis(module.space, held)
        inside = iter(coordinates)
        inputs = [None if product is None else next(inside) for product in products]
        small = tuple(coordinates[0].shape)
        unit = module.unit(small, double=True)
        sources = [_Panels((small[0], small[1]), _slice(x), torch.float64) for x in inputs]
        merged = _merge(module.method, unit, sources)
        if isinstance(merged, torch.Tensor):
            return _fit(back(merged), module.limit, dtype, module.name)
    weights = [weight for weight, product in zip(merged, products, strict=True) if product is not None]
    return _fit(add_products(held, weights), module.limit, dtype, module.name)


def _fit(product: Product, limit: Limit, dtype: torch.dtype, name: str) -> Fitted:
    if limit == Limit():
        b, a = product.b.double(), product.a.double()
        energy = float((b.T @ b).mul(a @ a.T).sum())  # |b a|^2
        return Fitted(Product(product.b.to(dtype), product.a.to(dtype)), energy, energy)
    if not all(bool(x.isfinite().all()) for x in product):
        raise PlanError(f"{name}: its merged values are too large; choose smaller weights")
    fitted = fit(product, limit)
    return Fitted(Product(*(x.to(dtype) for x in fitted.product)), fitted.energy, fitted.kept)


def _shared_basis(
    space: str, products: Sequence[Product]
) -> tuple[list[torch.Tensor], Callable[[torch.Tensor], Product]]:
    """The products' coordinates, float64, and the way from coordinates to a product."""
    if space == "knots":
        basis, coordinates = knots(products)
        return coordinates, lambda merged: Product(basis, merged)
    left, right, cores = core_space(products)
    return cores, lambda merged: Product(left @ merged, right.T)


def _read(product: Product | None) -> Read:
    return _nothing if product is None else partial(multiply, product)


def _slice(x: torch.Tensor | None) -> Read:
    return _nothing if x is None else lambda first, last: x[first:last]


def _nothing(_first: int, _last: int) -> None:
    return None


@dataclass
class _Panels:
    """A matrix read by ranges of elements or rows, and made by panels that do not depend on these. One is kept."""

    shape: tuple[int, int]
    read: Read
    dtype: torch.dtype
    _first: int = -1
    _panel: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def rows(self, first: int, last: int) -> torch.Tensor:
        step = max(1, PANEL // max(1, self.shape[1]))
        starts = range(first // step * step, last, step)
        parts = [self._at(start, min(self.shape[0], start + step)) for start in starts]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole[first - starts.start : last - starts.start]

    def _at(self, first: int, last: int) -> torch.Tensor:
        if self._first != first:
            panel = self.read(first, last)
            self._panel = torch.zeros(last - first, self.shape[1], dtype=self.dtype) if panel is None else panel
            self._first = first
        return self._panel

    def elements(self, start: int, stop: int) -> torch.Tensor:
        columns = self.shape[1]
        first = start // columns
        return self.rows(first, -(-stop // columns)).reshape(-1)[start - first * columns : stop - first * columns]


@dataclass(frozen=True)
class _Changes:
    """The changes as `Matrices`, of a base that is zero."""

    inputs: Sequence[_Panels]

    @property
    def shape(self) -> tuple[int, int]:
        return self.inputs[0].shape

    def matrix(self, i: int, start: int, stop: int) -> torch.Tensor:
        return self.inputs[i].rows(start, stop).to(torch.float64, copy=True)

    def base(self, start: int, stop: int) -> torch.Tensor:
        return torch.zeros(stop - start, self.shape[1], dtype=torch.float64)

    def gram(self, i: int, start: int, stop: int) -> torch.Tensor:
        raise NotImplementedError("methods with Gram matrices are refused before")


def _merge(method: Method, unit: Unit, inputs: Sequence[_Panels]) -> torch.Tensor | Sequence[float]:
    """The merged matrix; or, where it is a weighted sum of the inputs, their weights."""
    dtype = inputs[0].dtype
    if method.whole is not None and method.whole.view(unit) is not None:
        (matrix,) = method.whole.merge(unit, [_Changes(inputs)])
        return matrix.to(dtype)
    zero = None if method.base == "member" else _Panels(inputs[0].shape, _nothing, dtype).elements
    blocks = Blocks(
        [x.elements for x in inputs],
        zero,
        unit.numel,
        block_numel(method, unit),
        torch.float64 if unit.double else dtype,
    )
    coefficients = run_solve(method.solve(unit), blocks.reduce)
    weights = _weights_of(method, coefficients)
    if weights is not None:
        return weights
    merged = torch.empty(unit.numel, dtype=dtype)
    for i in range(len(blocks)):
        block = blocks.load(i)
        merged[block.start : block.start + block.count] = apply_to(block, method, coefficients, dtype)
    return merged.view(inputs[0].shape)


def _weights_of(method: Method, coefficients: Coefficients) -> Sequence[float] | None:
    """The weights of a plain weighted sum; None if the coefficients are of something else."""
    if method.apply is weighted_sum and isinstance(coefficients, Weights):
        return coefficients.values
    if method.apply is not sparse_sum or not isinstance(coefficients, SparseSum):
        return None
    plain = coefficients.mask is None and coefficients.votes is None
    return [factor * coefficients.lambda_ for factor in coefficients.factors] if plain else None
