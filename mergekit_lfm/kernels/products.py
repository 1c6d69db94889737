"""Products b @ a of two small matrices, b [out, rank] and a [rank, in]: their sums, their bases, their best factors.

Only `factor` and `multiply` see a matrix [out, in]. Decompositions are in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mergekit_lfm.kernels.low_rank import FIRST, approximate, rank_for

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RESOLUTION = 2.0**-52  # of float64
LEAST = 1e-13  # of the energy: the square of what float32 resolves, and less
# Directions with a smaller share of the largest singular value are noise of rounding. KnOTS' code has 1e-5 as the value
# itself, which suits one size of adapters.
SMALLEST = 1e-5


class Product(NamedTuple):
    """The matrix b @ a, with b [out, rank] and a [rank, in]."""

    b: Tensor
    a: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def expert(self, number: int, count: int) -> Product:
        """One of `count` experts, of PEFT's matrices of them all: rows of a together, every so many columns of b."""
        rank = self.rank // count
        return Product(self.b[:, number::count], self.a[number * rank : (number + 1) * rank])

    def padded(self, rank: int) -> Product:
        """The same matrix at a larger rank, with zeros."""
        import torch

        more = rank - self.rank
        return Product(torch.nn.functional.pad(self.b, (0, more)), torch.nn.functional.pad(self.a, (0, 0, 0, more)))


class Fitted(NamedTuple):
    """A product that stands for a matrix. energy: the matrix's, the sum of its squares; kept: that of the product."""

    product: Product
    energy: float
    kept: float


class Limit(NamedTuple):
    """How large the rank of a product may be: at most `rank`, and as small as it keeps the share `energy`."""

    rank: int | None = None
    energy: float | None = None


def multiply(product: Product, first: int, last: int) -> Tensor:
    """Rows first .. last of the matrix."""
    return product.b[first:last] @ product.a


def add_products(products: Sequence[Product], weights: Sequence[float]) -> Product:
    """The weighted sum of the matrices, exactly: at the sum of their ranks, and with all their a as they are."""
    import torch

    b = torch.cat([product.b * weight for product, weight in zip(products, weights, strict=True)], 1)
    return Product(b, torch.cat([product.a for product in products]))


def fit(product: Product, limit: Limit) -> Fitted:
    """The best product of a limited rank, from the small factors alone."""
    import torch

    left, right = (torch.linalg.qr(x.double()) for x in (product.b, product.a.T))
    u, s, v = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    return _cut(left.Q @ u, s, v @ right.Q.T, float(s.square().sum()), limit, product.a.dtype)


def factor(matrix: Tensor, limit: Limit, key: int = 0) -> Fitted:
    """The best product of a limited rank for a matrix [out, in]; of a large one, nearly the best. key: for that."""
    side = min(matrix.shape)
    tried = min(side, FIRST if limit.rank is None else limit.rank)
    while True:
        near = approximate(matrix, tried, key)
        rank: int | None = tried
        if limit.energy is not None:
            rank = rank_for(near.energies, near.total, limit.energy)
        if rank is not None or tried == side:
            break
        tried = min(side, 2 * tried)
    rank = min(tried if rank is None else rank, int((near.energies > LEAST * near.total).sum()))
    a, b = near.factors(max(1, rank))
    return Fitted(Product(b, a), near.total, min(near.total, float(near.energies[:rank].sum())))


def _cut(u: Tensor, s: Tensor, v: Tensor, energy: float, limit: Limit, dtype: torch.dtype) -> Fitted:
    """The first columns of u and rows of v, each times the roots of the singular values s."""
    squares = s.square()
    count = int((s > RESOLUTION * max(len(u), v.shape[1]) * s[:1]).sum())
    if limit.energy is not None:
        count = min(count, 1 + int((squares.cumsum(0) < limit.energy * energy).sum()))
    count = max(1, count if limit.rank is None else min(count, limit.rank))
    roots = s[:count].sqrt()
    product = Product((u[:, :count] * roots).to(dtype), (roots[:, None] * v[:count]).to(dtype))
    return Fitted(product, energy, min(energy, float(squares[:count].sum())))


def knots(products: Iterable[Product]) -> tuple[Tensor, list[Tensor]]:
    """U [out, k] and the S V_i^T [k, in] of [D_1 ... D_n] = U S [V_1 ... V_n]^T, from the factors of the D_i.

    Source: Stoica et al. 2024, Model merging with SVD to tie the KnOTS, arXiv 2410.19735, section 4.
    """
    import torch

    products = [Product(b.double(), a.double()) for b, a in products]
    left = torch.linalg.qr(torch.cat([b for b, _ in products], 1))
    own = left.R.split([product.rank for product in products], 1)
    right = [torch.linalg.qr(a.T, mode="r").R.T for _, a in products]  # a_i is right_i times orthonormal rows
    u, s, _ = torch.linalg.svd(torch.cat([x @ y for x, y in zip(own, right, strict=True)], 1), full_matrices=False)
    u = u[:, s >= SMALLEST * s[:1]]
    return left.Q @ u, [(u.T @ x) @ a for x, (_, a) in zip(own, products, strict=True)]


def core_space(products: Iterable[Product]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """U [out, p] and V [in, q], bases of all b and all a^T, and the matrices U^T D_i V [p, q].

    Source: Panariello et al. 2025, Accurate and efficient low-rank model merging in Core Space, arXiv 2509.17786,
    section 3.
    """
    import torch

    products = [Product(b.double(), a.double()) for b, a in products]
    u = _basis(torch.cat([b for b, _ in products], 1))
    v = _basis(torch.cat([a for _, a in products]).T)
    return u, v, [(u.T @ b) @ (a @ v) for b, a in products]


def _basis(columns: Tensor) -> Tensor:
    """The left singular vectors of a matrix, without those of values that are 0 but for rounding."""
    import torch

    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    basis: Tensor = u[:, s >= RESOLUTION * max(columns.shape) * s[:1]]
    return basis
