"""RegMean: the linear layer whose outputs are nearest to those of every model, each on its own data.

The bias belongs to the regression: inputs have a 1 appended, so matrices have the bias as their last column. The sums
over models read one band of rows of one Gram matrix at a time, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from mergekit_lfm.kernels.sums import Weights, weighted_sum
from mergekit_lfm.methods.linear import normalise
from mergekit_lfm.methods.method import Matrices, Method, Parameter, Unit, Whole, immediate

if TYPE_CHECKING:
    import torch

BAND = 256  # rows of a Gram matrix read at a time
OUTPUTS = 1024  # rows of a layer solved at a time
GRAM_RESOLUTION = 2.0**-23  # of the float32 in which Gram matrices are stored
LEAST_RIDGE = 2.0**-20  # the rounding of a Gram matrix has at most 2^-24 of its norm


@immediate
def _average(unit: Unit) -> Weights:
    return Weights(normalise(unit.floats("weight"), unit, switch=None))


def _merge(unit: Unit, layers: Sequence[Matrices]) -> Iterator[torch.Tensor]:
    """M + (sum_i l_i (W_i - M) G_i) (sum_i l_i G_i + r I)^-1 with M the weighted average of the W_i.

    The minimiser of sum_i l_i tr (W - W_i) G_i (W - W_i)^T + r |W - M|^2; for r = 0 that of Jin et al. 2023. The
    entries of G_i off its diagonal are scaled by `alpha`; r is `ridge` times the Frobenius norm of sum_i l_i G_i. With
    r = 0 directions that no model's data have keep the average.
    """
    import torch

    weights = normalise(unit.floats("weight"), unit, switch=None)
    divide = _division(unit, weights, layers[0])
    for layer in layers:
        outputs, inputs = layer.shape
        merged = torch.empty(outputs, inputs, dtype=torch.float64)
        for first in range(0, outputs, OUTPUTS):
            last = min(outputs, first + OUTPUTS)
            mean = torch.zeros(last - first, inputs, dtype=torch.float64)
            for i, weight in enumerate(weights):
                mean += layer.matrix(i, first, last).mul_(weight)
            pull = torch.zeros_like(mean)
            for i, weight in enumerate(weights):
                apart = layer.matrix(i, first, last).sub_(mean)
                for start, band in _bands(unit, layer, i):
                    pull.addmm_(apart[:, start : start + len(band)], band, alpha=weight)
            merged[first:last] = mean.add_(divide(pull))
        yield merged


def _bands(unit: Unit, layer: Matrices, i: int) -> Iterator[tuple[int, torch.Tensor]]:
    """The bands of rows of input i's Gram matrix with their first rows; entries off the diagonal are times alpha."""
    inputs, alpha = layer.shape[1], unit.number("alpha")
    for start in range(0, inputs, BAND):
        band = layer.gram(i, start, min(inputs, start + BAND))
        diagonal = band.diagonal(start)
        kept = diagonal.clone()
        band *= alpha
        diagonal.copy_(kept)
        yield start, band


def _division(unit: Unit, weights: Sequence[float], layer: Matrices) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function x -> x (S + r I)^-1, which overwrites x, for the sum S of the weighted Gram matrices.

    Uses Cholesky; if S is singular as far as float32 can tell and has no ridge, a generalised inverse whose values are
    orthogonal to all directions in which S is 0.
    """
    import torch

    total, scale = _scaled_sum(unit, weights, layer)
    finite = bool(total.sum().isfinite())
    factor = total.T  # symmetric, and in the column order in which LAPACK works in place
    _, failed = torch.linalg.cholesky_ex(factor, out=(factor, torch.empty((), dtype=torch.int32)))
    if (
        finite
        and not _has_ridge(unit)
        and (failed or float(factor.diagonal().min()) ** 2 < len(factor) * GRAM_RESOLUTION)
    ):
        return _singular_division(*_scaled_sum(unit, weights, layer))

    def divide(x: torch.Tensor) -> torch.Tensor:
        columns = x.mul_(scale).T
        torch.linalg.solve_triangular(factor, columns, upper=False, out=columns)
        torch.linalg.solve_triangular(factor.T, columns, upper=True, out=columns)
        return x.mul_(scale)

    return divide


def _singular_division(total: torch.Tensor, scale: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch

    values, vectors = torch.linalg.eigh(total)
    kept = values > len(values) * GRAM_RESOLUTION * float(values[-1].clamp(min=0))
    inverse = torch.where(kept, 1 / values, 0.0)
    null, _ = torch.linalg.qr(scale[:, None] * vectors[:, ~kept])  # of S itself, orthonormal

    def divide(x: torch.Tensor) -> torch.Tensor:
        x = ((x.mul_(scale) @ vectors).mul_(inverse) @ vectors.T).mul_(scale)
        return x.sub_((x @ null) @ null.T)

    return divide


def _scaled_sum(unit: Unit, weights: Sequence[float], layer: Matrices) -> tuple[torch.Tensor, torch.Tensor]:
    """T (S + r I) T and the diagonal of T, with which that has a diagonal of 1 where it is not 0: so it is factored
    more exactly."""
    import torch

    inputs = layer.shape[1]
    total = torch.zeros(inputs, inputs, dtype=torch.float64)
    for i, weight in enumerate(weights):
        for start, band in _bands(unit, layer, i):
            total[start : start + len(band)] += band.mul_(weight)
    diagonal = total.diagonal()
    if _has_ridge(unit):
        diagonal += unit.number("ridge") * float(torch.linalg.matrix_norm(total))
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 1.0)
    return total.mul_(scale).mul_(scale[:, None]), scale


def _has_ridge(unit: Unit) -> bool:
    """True if the ridge exceeds the rounding of the matrices, which would hide a smaller one."""
    return unit.number("ridge") >= LEAST_RIDGE


def _nbytes(unit: Unit, outputs: int, inputs: int) -> int:
    """The sum, which is factored in place, a few bands, and the rows of a layer that are solved for.

    A sum that may turn out to be singular takes seven times as much more for its eigenvectors.
    """
    squares = 1 if _has_ridge(unit) else 8
    return 8 * inputs * (squares * inputs + 3 * BAND + 6 * min(outputs, OUTPUTS) + 3 * outputs)


METHODS = (
    Method(
        name="regmean",
        source="Jin et al. 2023, Dataless knowledge fusion by merging weights of language models, arXiv 2212.09849",
        summary="linear layers by least squares on each model's data, the rest averaged; needs `stats` for each model",
        parameters=(
            Parameter("weight", 1.0, per_input=True, minimum=0, doc="relative weight of the model's data"),
            Parameter(
                "alpha",
                0.9,
                per_input=False,
                minimum=0,
                maximum=1,
                doc="factor of the Gram matrices' entries off the diagonal; 1 is plain least squares",
            ),
            Parameter(
                "ridge",
                1e-6,
                per_input=False,
                minimum=0,
                doc="pull towards the average, relative to the norm of the summed Gram matrices; below 9.6e-7 none",
            ),
        ),
        base="member",
        inputs=(1, None),
        solve=_average,
        apply=weighted_sum,
        statistics="gram",
        whole=Whole(_merge, _nbytes),
    ),
)
