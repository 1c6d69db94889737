"""Merges of task vectors by their singular vectors: TSV-M and Iso-C.

D_i is the delta of a matrix of model i to the base's, times its weight. Both methods add lambda times a merged delta to
the base; tensors that they do not decompose get lambda times the mean of the deltas, as in the authors' code.

A polar factor is U V^T of A = U S V^T, over the singular values that are not 0 as far as float64 can tell: directions
that no model has changed are arbitrary in A's decomposition, and have no part in the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mergekit_lfm.methods.method import Matrices, Method, Parameter, Unit, Whole, as_matrix, immediate
from mergekit_lfm.methods.task_vectors import LAMBDA, SparseSum, apply

if TYPE_CHECKING:
    import torch

RESOLUTION = 2.0**-52  # of float64


def tsv_delta(deltas: Iterator[torch.Tensor], count: int) -> torch.Tensor:
    """polar(U) S polar(V)^T [rows, columns] for the first r / count singular triples of each of `count` deltas.

    r is the smaller side; where it is less than count each delta gives one triple. Source: TSV-Merge, arXiv 2412.00081,
    algorithm 1.
    """
    import torch

    left, values, right = [], [], []
    for delta in deltas:
        u, s, v = _svd(delta)
        kept = min(max(1, min(delta.shape) // count), _rank(s, delta.shape))
        left.append(u[:, :kept].clone())  # a view would hold all of u
        values.append(s[:kept])
        right.append(v[:, :kept].clone())
        shape = delta.shape
        del delta, u, v
    if not any(len(s) for s in values):
        return torch.zeros(shape, dtype=torch.float64)
    factors = [_polar(torch.cat(side, 1)) for side in (left, right)]
    return (factors[0] * torch.cat(values)) @ factors[1].T


def iso_delta(total: torch.Tensor) -> torch.Tensor:
    """mean(S) U V^T [rows, columns] for the summed deltas U S V^T.

    Source: Iso-C, arXiv 2502.04959, equation 6.
    """
    import torch

    u, s, v = _svd(total)
    kept = _rank(s, total.shape)
    product: torch.Tensor = u[:, :kept] @ v[:, :kept].T
    return product.mul_(s.mean() if s.numel() else torch.zeros(()))


def _polar(x: torch.Tensor) -> torch.Tensor:
    u, s, v = _svd(x)
    kept = _rank(s, x.shape)
    return u[:, :kept] @ v[:, :kept].T


def _svd(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [rows, r], S [r], V [columns, r], of x or its transpose: LAPACK decomposes tall matrices twice as fast."""
    import torch

    wide = x.shape[0] < x.shape[1]
    u, s, vh = torch.linalg.svd(x.T if wide else x, full_matrices=False)
    return (vh.T, s, u) if wide else (u, s, vh.T)


def _rank(s: torch.Tensor, shape: Sequence[int]) -> int:
    """The number of descending singular values that exceed the rounding of the largest."""
    return int((s > s[:1] * (max(shape) * RESOLUTION)).sum())


def _deltas(unit: Unit, matrices: Matrices) -> Iterator[torch.Tensor]:
    for i, weight in enumerate(unit.floats("weight")):
        yield matrices.matrix(i, 0, matrices.shape[0]).mul_(weight)


def _merge_tsv(unit: Unit, tensors: Sequence[Matrices]) -> Iterator[torch.Tensor]:
    for matrices in tensors:
        delta = tsv_delta(_deltas(unit, matrices), len(unit.inputs))
        yield delta.mul_(unit.number("lambda")).add_(matrices.base(0, matrices.shape[0]))


def _merge_iso(unit: Unit, tensors: Sequence[Matrices]) -> Iterator[torch.Tensor]:
    for matrices in tensors:
        deltas = _deltas(unit, matrices)
        total = next(deltas)
        for delta in deltas:
            total.add_(delta)
        yield iso_delta(total).mul_(unit.number("lambda")).add_(matrices.base(0, matrices.shape[0]))


def _nbytes_tsv(unit: Unit, rows: int, columns: int) -> int:
    """All triples that are kept, and a decomposition."""
    triples = max(min(rows, columns), len(unit.inputs))
    return _nbytes_iso(unit, rows, columns) + 8 * triples * (rows + columns)


def _nbytes_iso(_: Unit, rows: int, columns: int) -> int:
    """The matrix, its copy for LAPACK, U, V and the base's rows; and LAPACK's workspace."""
    smaller = min(rows, columns)
    return 8 * (6 * rows * columns + 6 * smaller * smaller + 64 * (rows + columns))


@immediate
def _average(unit: Unit) -> SparseSum:
    factor = unit.number("lambda") / len(unit.inputs)
    factors = tuple(factor * weight for weight in unit.floats("weight"))
    return SparseSum(factors, mask=None, votes=None, normalize=False, lambda_=1.0)


def _view(unit: Unit) -> tuple[int, int] | None:
    """Tensors of two dimensions; those of more, [first, all others], if asked."""
    decompose = unit.shared["decompose"]
    if decompose == "kernels" and len(unit.shape) > 2:
        return unit.shape[0], unit.numel // unit.shape[0]
    return None if decompose == "none" else as_matrix(unit)


PARAMETERS = (
    Parameter("weight", 1.0, per_input=True, doc="factor of the input's delta"),
    LAMBDA,
    Parameter(
        "decompose",
        "matrices",
        per_input=False,
        kind="str",
        choices=("matrices", "kernels", "none"),
        doc="which tensors: those of two dimensions; also kernels of more, as [outputs, rest]; or none. Others are "
        "averaged",
    ),
)


def _method(name: str, source: str, summary: str, whole: Whole) -> Method:
    return Method(
        name=name,
        source=source,
        summary=summary,
        parameters=PARAMETERS,
        base="required",
        inputs=(1, None),
        solve=_average,
        apply=apply,
        whole=whole,
    )


METHODS = (
    _method(
        "tsv",
        "Gargiulo et al. 2025, Task singular vectors (TSV-Merge), arXiv 2412.00081",
        "the largest singular triples of each delta, with their vectors made orthogonal across models",
        Whole(_merge_tsv, _nbytes_tsv, _view),
    ),
    _method(
        "iso_c",
        "Marczak et al. 2025, No task left behind (Iso-C), arXiv 2502.04959",
        "the summed deltas, all of whose singular values become their mean",
        Whole(_merge_iso, _nbytes_iso, _view),
    ),
)
