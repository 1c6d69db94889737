"""The best approximation of a matrix by a product of two small ones: exact, or randomised.

Both give an orthonormal basis of one side and the matrix's coordinates in it, sorted by their energy, the square of a
singular value. So the share of |D|^2 that the first ones keep is known exactly, however good the basis is.
Source: Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithms 4.4 (range finder) and 5.1 (decomposition).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mergekit_lfm.kernels.random import normal

if TYPE_CHECKING:
    from torch import Tensor

OVERSAMPLING = 10  # columns beyond the rank at least, as the source advises; a quarter of it for large ones
POWERS = 3  # iterations with D D^T, for spectra that decay slowly
SMALL = 256  # of the smaller side: decomposed exactly in no time
FIRST = 16  # the rank to try first where a share of the energy is asked for
AT_ONCE = 1 << 18  # elements to square
COLUMNS = 1 << 11  # of a matrix in float64 at a time


class LowRank(NamedTuple):
    """D ~ unit @ other, or its transpose if `turned`, by descending energies.

    unit [smaller side, k], orthonormal; other [k, larger side]; energies float64 [k], on the processor; total: |D|^2.
    """

    unit: Tensor
    other: Tensor
    turned: bool
    energies: Tensor
    total: float

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank], each with the roots of the singular values, on the processor."""
        roots = self.energies[:rank].sqrt().sqrt().to(self.other.device, self.other.dtype)
        unit, other = self.unit[:, :rank] * roots, self.other[:rank] / roots[:, None]
        other[roots == 0] = 0
        a, b = (unit.T, other.T) if self.turned else (other, unit)
        return a.cpu(), b.cpu()


def is_exact(rows: int, columns: int, rank: int, *, exact: bool) -> bool:
    """Whether a matrix is decomposed exactly: if asked, if it is small, or if the rank is above a quarter of a side."""
    side = min(rows, columns)
    return exact or side <= SMALL or 4 * rank > side


def approximate(d: Tensor, rank: int, key: int, *, exact: bool = False) -> LowRank:
    """The first `rank` directions of d [out, in], at most its smaller side. key: decides the random numbers."""
    import torch

    turned = d.shape[0] > d.shape[1]
    x = d.T if turned else d
    total = energy_of(d)
    if is_exact(d.shape[0], d.shape[1], rank, exact=exact):
        unit = _directions(x)[:, :rank].to(x.dtype)
        other = unit.T @ x
    else:
        basis = _find_range(x, rank + max(OVERSAMPLING, rank // 4), key)
        inside = basis.T @ x
        inner = _directions(inside).to(x.dtype)
        unit, other = (basis @ inner)[:, :rank], (inner.T @ inside)[:rank]
    energies = torch.tensor([energy_of(row[None]) for row in other], dtype=torch.float64)
    return LowRank(unit, other, turned, energies, total)


def energy_of(x: Tensor) -> float:
    """The sum of the squares of a matrix in float64, some rows at a time: torch would make a copy in float64."""
    rows = max(1, AT_ONCE // max(1, x.shape[1]))
    parts = (x[start : start + rows].double() for start in range(0, x.shape[0], rows))
    return sum(float(part.square().sum()) for part in parts)


def scratch(rows: int, columns: int, rank: int, *, exact: bool) -> int:
    """The numbers of float32 that decomposing such a matrix takes at most, itself among them."""
    side = min(rows, columns)
    if is_exact(rows, columns, rank, exact=exact):
        return rows * columns + 2 * (4 * side * side + 2 * side * COLUMNS) + 2 * rank * (rows + columns)
    return rows * columns + 12 * (rank + max(OVERSAMPLING, rank // 4)) * (rows + columns)


def rank_for(energies: Tensor, total: float, share: float) -> int | None:
    """The least rank that keeps this share of the total; None if that takes more than these energies."""
    kept = energies.cumsum(0)
    enough = (kept >= share * total).nonzero()
    return int(enough[0]) + 1 if len(enough) else None


def _directions(x: Tensor) -> Tensor:
    """The left singular vectors [rows, rows] of a wide matrix, by descending singular values, in float64.

    They are the eigenvectors of x x^T, which has the square of x's precision in float64 if x is float32.
    """
    import torch

    gram = torch.zeros(x.shape[0], x.shape[0], dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[1], COLUMNS):
        part = x[:, start : start + COLUMNS].double()
        gram += part @ part.T
    directions: Tensor = torch.linalg.eigh(gram).eigenvectors.flip(1)
    return directions


def _find_range(x: Tensor, count: int, key: int) -> Tensor:
    """An orthonormal basis [rows, count] of nearly all that x [rows, columns] does."""
    import torch

    draws = normal(key, x.shape[1] * count).view(x.shape[1], count).to(x.device, x.dtype)
    basis: Tensor = torch.linalg.qr(x @ draws).Q
    for _ in range(POWERS):
        basis = torch.linalg.qr(x @ torch.linalg.qr(x.T @ basis).Q).Q
    return basis
