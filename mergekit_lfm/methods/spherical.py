"""Merges along great circles. Results lie in the span of the inputs: the Gram matrix is all that a solve needs.

A vector is written by its coefficients in the inputs, a; its inner product with b is a G b. All solves are float64.
"""

from __future__ import annotations

from collections.abc import Generator
from math import acos, cos, sin, sqrt
from typing import TYPE_CHECKING, Any

from mergekit_lfm.errors import PlanError
from mergekit_lfm.kernels.reductions import ColumnGram, Gram, Reduction, RowGram
from mergekit_lfm.kernels.sums import Spread, Weights, weighted_sum
from mergekit_lfm.methods.linear import WEIGHT, normalise
from mergekit_lfm.methods.method import REQUIRED, Method, Parameter, Unit

if TYPE_CHECKING:
    import torch

Vector = list[float]
LERP_ABOVE = 0.9995  # |cos| from which slerp takes the chord, as its common implementations do
WEIGHT_RESOLUTION = 1e-6  # of nuslerp's weights: those that cancel to less go half way
ANGLE_RESOLUTION = 1e-7  # lengths of unit vectors' sums that rounding of a float64 Gram matrix cannot tell from 0


class _Span:
    """Algebra on coefficient vectors under one Gram matrix."""

    def __init__(self, gram: torch.Tensor) -> None:
        self.gram: list[Vector] = gram.tolist()
        self.size = len(self.gram)

    def dot(self, a: Vector, b: Vector) -> float:
        return sum(x * g * y for x, row in zip(a, self.gram, strict=True) for g, y in zip(row, b, strict=True))

    def norm(self, a: Vector) -> float:
        return sqrt(max(self.dot(a, a), 0.0))

    def axis(self, i: int, length: float) -> Vector:
        """The coefficients of input i divided by `length`."""
        return [1.0 / length if k == i else 0.0 for k in range(self.size)]

    def mean(self, vectors: list[Vector], weights: Vector) -> Vector:
        return [sum(w * v[k] for w, v in zip(weights, vectors, strict=True)) for k in range(self.size)]

    def exp(self, point: Vector, tangent: Vector) -> Vector:
        """exp_point(tangent) on the unit sphere."""
        length = self.norm(tangent)
        along = sin(length) / length if length else 1.0
        return [cos(length) * p + along * t for p, t in zip(point, tangent, strict=True)]


def _scaled(vector: Vector, factor: float) -> Vector:
    return [factor * x for x in vector]


def _slerp(unit: Unit) -> Generator[Reduction, Any, Weights]:
    span = _Span((yield Gram()))
    t = unit.number("t")
    first, second = (sqrt(span.gram[i][i]) or 1.0 for i in range(2))
    cosine = max(-1.0, min(1.0, span.gram[0][1] / first / second))
    if abs(cosine) > LERP_ABOVE:
        return Weights([1.0 - t, t])
    angle = acos(cosine)
    return Weights([sin((1.0 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)])


def _multislerp(unit: Unit) -> Generator[Reduction, Any, Weights]:
    weights = unit.floats("weight")
    if len(weights) == 1:
        return Weights([1.0])
    if unit.shared["normalize_weights"]:
        weights = normalise(weights, unit, "normalize_weights")
    span = _Span((yield Gram()))
    eps = unit.number("eps")
    norms = [sqrt(span.gram[i][i]) for i in range(span.size)]
    if not any(norms):
        return Weights([0.0] * span.size)
    units = [span.axis(i, norm or 1.0) for i, norm in enumerate(norms)]
    centre = span.mean(units, weights)
    length = span.norm(centre)
    if length <= max(eps, ANGLE_RESOLUTION) * sum(map(abs, weights)):
        if span.size == 2:
            return Weights(weights)
        raise PlanError(
            f"{unit.name}: the weighted mean direction of the {span.size} inputs vanishes, so multislerp has no "
            "tangent space there; use other weights, or another method for this tensor"
        )
    centre = _scaled(centre, 1.0 / length)
    tangents = [[u - span.dot(unit_, centre) * c for u, c in zip(unit_, centre, strict=True)] for unit_ in units]
    point = span.exp(centre, span.mean(tangents, weights))
    return Weights(_scaled(point, sum(w * n for w, n in zip(weights, norms, strict=True))))


def _karcher(unit: Unit) -> Generator[Reduction, Any, Weights]:
    shares = normalise(unit.floats("weight"), unit, switch=None)
    span = _Span((yield Gram()))
    tol = unit.number("tol")
    norms = [sqrt(span.gram[i][i]) for i in range(span.size)]
    valid = [i for i, norm in enumerate(norms) if norm and shares[i]]
    if not valid:
        return Weights([0.0] * span.size)
    units = [span.axis(i, norms[i]) for i in valid]
    weights = normalise([shares[i] for i in valid], unit, switch=None)
    mean = span.mean(units, weights)
    length = span.norm(mean)
    point = units[0] if length < tol else _scaled(mean, 1.0 / length)
    for _ in range(int(unit.number("max_iter"))):
        logs = []
        for vector in units:
            cosine = max(-1.0, min(1.0, span.dot(vector, point)))
            angle = acos(cosine)
            opposite = cosine < ANGLE_RESOLUTION**2 - 1  # it lies in all directions at once, and so pulls in none
            stretch = 0.0 if opposite else angle / sin(angle) if angle > 0 else 1.0
            logs.append([stretch * (v - cosine * p) for v, p in zip(vector, point, strict=True)])
        step = span.mean(logs, weights)
        if span.norm(step) < tol:
            break
        point = span.exp(point, step)
        point = _scaled(point, 1.0 / span.norm(point))
    return Weights(_scaled(point, sum(s * n for s, n in zip(shares, norms, strict=True))))


def _row(unit: Unit) -> int | None:
    """Elements of one row of the matrix whose rows or columns nuslerp turns; None if the tensor is one vector."""
    if unit.shared["nuslerp_flatten"] or len(unit.shape) < 2 or not unit.numel:
        return None
    return unit.numel // unit.shape[0] if unit.shared["nuslerp_row_wise"] else unit.shape[-1]


def _sums(unit: Unit) -> int:
    row = _row(unit)
    return 0 if row is None else 4 * (row if unit.shared["nuslerp_row_wise"] else unit.numel // row)


def _nuslerp(unit: Unit) -> Generator[Reduction, Any, Weights | Spread]:
    row, columns = _row(unit), bool(unit.shared["nuslerp_row_wise"])
    gram = yield (Gram() if row is None else ColumnGram(row) if columns else RowGram(row))
    import torch

    first, second = unit.floats("weight")
    total = first + second
    t = second / total if abs(total) >= WEIGHT_RESOLUTION * (abs(first) + abs(second)) > 0 else 0.5
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()  # [..., 2]
    norms = torch.where(norms > 0, norms, 1.0)
    cosine = (gram[..., 0, 1] / norms[..., 0] / norms[..., 1]).clamp(-1, 1)
    flat = 1 - cosine.square() <= ANGLE_RESOLUTION**2  # opposite vectors have no great circle, equal ones need none
    angle = cosine.acos()
    sine = torch.where(flat, 1.0, angle.sin())
    head = torch.where(flat, 1.0 - t, ((1.0 - t) * angle).sin() / sine)
    tail = torch.where(flat, t, (t * angle).sin() / sine)
    weights = torch.stack([head, tail], dim=-1)
    return Weights(weights.tolist()) if row is None else Spread(weights, row, columns, unit.start)


METHODS = (
    Method(
        name="slerp",
        source="Shoemake 1985, Animating rotation with quaternion curves",
        summary="spherical interpolation from the base model to the other",
        parameters=(Parameter("t", REQUIRED, per_input=False, doc="0 gives the base model, 1 the other"),),
        base="first",
        inputs=(2, 2),
        solve=_slerp,
        apply=weighted_sum,
        version=2,
    ),
    Method(
        name="nuslerp",
        source="Shoemake 1985; weights and deltas as in mergekit's method of this name",
        summary="spherical interpolation of two models, or of their deltas to a base, also by row or column",
        parameters=(
            WEIGHT,
            Parameter("nuslerp_flatten", True, per_input=False, kind="bool", doc="false: turn every row by itself"),
            Parameter(
                "nuslerp_row_wise",
                False,
                per_input=False,
                kind="bool",
                doc="with nuslerp_flatten false: vectors along the first axis (columns) instead of the last",
            ),
        ),
        base="optional",
        inputs=(2, 2),
        solve=_nuslerp,
        apply=weighted_sum,
        version=2,
        row=_row,
        by_row=lambda unit: _row(unit) is not None and not unit.shared["nuslerp_row_wise"],
        sums=_sums,
    ),
    Method(
        name="multislerp",
        source="tangent mean at the weighted mean direction, one step of Buss and Fillmore 2001, algorithm A1",
        summary="spherical mean of any number of models, or of their deltas to a base, in one step",
        parameters=(
            WEIGHT,
            Parameter("normalize_weights", True, per_input=False, kind="bool", doc="divide the weights by their sum"),
            Parameter(
                "eps",
                1e-8,
                per_input=False,
                above=0,
                doc="a shorter mean of the directions, for weights of sum 1, counts as none",
            ),
        ),
        base="optional",
        inputs=(1, None),
        solve=_multislerp,
        apply=weighted_sum,
        version=2,
        copies=lambda unit: len(unit.inputs) == 1,
    ),
    Method(
        name="karcher",
        source="Karcher 1977; iteration of Buss and Fillmore 2001, algorithm A1",
        summary="weighted Riemannian mean of directions on the sphere, times the weighted mean of the norms",
        parameters=(
            Parameter("weight", 1.0, per_input=True, minimum=0, doc="relative weight of the input"),
            Parameter("max_iter", 10, per_input=False, kind="int", minimum=1, doc="most iterations"),
            Parameter("tol", 1e-5, per_input=False, above=0, doc="stop below this step, an angle in radians"),
        ),
        base="member",
        inputs=(1, None),
        solve=_karcher,
        apply=weighted_sum,
        version=2,
    ),
)
