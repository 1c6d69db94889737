"""The families of elements for a group, and the best of each: the matrix M of a kind with the greatest <C, M>.

C[i, j] is how well unit i of the one model matches unit j of the other. Orders are linear assignments, orthogonal
matrices polar factors (Procrustes), rotary pairs angles. Elements are complete here: every part is filled in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mergekit_lfm.arch.table import Group, Heads, Part, Units
from mergekit_lfm.artifacts.transform import Element, HeadsElement, UnitsElement
from mergekit_lfm.errors import PlanError
from mergekit_lfm.views.maps import CPU

TIE = 1e-12  # of the greatest score: a bonus that decides among orders that differ only by rounding

ChoiceKind = Literal["fixed", "order", "signed", "orthogonal", "phases", "signs"]


@dataclass(frozen=True, slots=True)
class Family:
    """The kinds of matrices that may act on a group. units: on `Units`; query_key, value_output: inside `Heads`."""

    units: ChoiceKind = "order"
    query_key: ChoiceKind = "fixed"
    value_output: ChoiceKind = "order"


def permutations(group: Group) -> Family:
    """Orders only: of units, of heads, and inside heads if the table allows any matrix there."""
    return Family(query_key="order" if isinstance(group, Heads) and group.query_key == "linear" else "fixed")


def rotations(group: Group) -> Family:
    """Orthogonal matrices and signs if the table allows them, else orders."""
    if isinstance(group, Units):
        signed = group.scale in ("sign", "nonzero")
        return Family("orthogonal" if group.rotation == "orthogonal" else "signed" if signed else "order")
    return Family(query_key="orthogonal" if group.query_key == "linear" else group.query_key, value_output="orthogonal")


def assign(scores: Tensor, now: Tensor | None = None) -> Tensor:
    """The order p, int64 [n], with the greatest sum_i scores[i, p[i]].

    now: the present order, by default 0, 1, ... Among equally good orders the one nearest to it wins.
    """
    present = (torch.arange(len(scores)) if now is None else now)[:, None]
    scores = scores.double()
    favour = TIE * float(scores.abs().max()) or 1.0
    favoured = scores.scatter(1, present, scores.gather(1, present) + favour)
    _, order = linear_sum_assignment(favoured.numpy(), maximize=True)
    return torch.from_numpy(order).long()


def polar(c: Tensor, device: torch.device = CPU) -> Tensor:
    """The orthogonal matrix O, float64, with the greatest <c, O>: U V^T of c = U S V^T. device: computes it.

    Source: Schönemann 1966, "A generalized solution of the orthogonal Procrustes problem", equation 1.7.
    """
    u, _, vt = torch.linalg.svd(c.to(device, torch.float64))
    rotation: Tensor = (u @ vt).cpu()
    return rotation


def signs_of(x: Tensor) -> Tensor:
    """The signs of x, float64: 1 or -1; 1 for 0."""
    return torch.where(x < 0, -1.0, 1.0).to(torch.float64)


def best_matrix(kind: ChoiceKind, c: Tensor, device: torch.device = CPU) -> Tensor:
    """The matrix of a kind, float64 [n, n], with the greatest <c, matrix>. c: float64 [n, n].

    phases, signs: a rotation, or a sign, for every rotary pair (i, i + n / 2). device: computes polar factors.
    """
    identity = torch.eye(len(c), dtype=torch.float64)
    if kind == "fixed":
        return identity
    if kind == "order":
        return identity[assign(c)]
    if kind == "orthogonal":
        return polar(c, device)
    i = torch.arange(len(c) // 2)
    j = i + len(i)
    along, across = c[i, i] + c[j, j], c[j, i] - c[i, j]
    length = torch.hypot(along, across)
    if kind == "signs":
        cosine, sine = signs_of(along), torch.zeros_like(along)
    else:
        safe = torch.where(length > 0, length, 1.0)
        cosine, sine = torch.where(length > 0, along / safe, 1.0), across / safe
    matrix = torch.zeros_like(identity)
    matrix[i, i], matrix[j, j], matrix[j, i], matrix[i, j] = cosine, cosine, sine, -sine
    return matrix


@dataclass(frozen=True)
class MatchScores:
    """How well the units of two models match: sums of products, one for each view of a group.

    For `Units`, float64 [m, n]: plain for axes that follow only the order; vector for those that factors and matrices
    act on, too. For `Heads`: key and value [groups * head_dim, the same]; query and output likewise, of all query
    heads. device: computes the polar factor of `Units`; those inside heads are small, and computed on the CPU.
    """

    sums: dict[str, Tensor]
    device: torch.device = CPU

    @classmethod
    def of(cls, products: Iterable[tuple[Part, Tensor]], device: torch.device = CPU) -> MatchScores:
        """Sum the products by the views of their parts, on the device where they lie."""
        sums: dict[str, Tensor] = {}
        names = {"": "vector", "'": "vector", "order": "plain", "gain": "plain", "shift": "plain"}
        for part, product in products:
            name = names.get(part.view, part.view)
            sums[name] = sums[name] + product.double() if name in sums else product.double()
        return cls({name: x.cpu() for name, x in sums.items()}, device)

    @property
    def finite(self) -> bool:
        """True if every sum of scores is finite."""
        return all(bool(x.abs().sum().isfinite()) for x in self.sums.values())

    def view(self, name: str, *shape: int) -> Tensor:
        """A sum in this shape; zeros without products for it."""
        total = self.sums.get(name)
        return torch.zeros(shape, dtype=torch.float64) if total is None else total.view(shape)


def best_units(group: Units, family: Family, scores: MatchScores, now: UnitsElement | None = None) -> UnitsElement:
    """The element of the family with the greatest <C, element>; among equally good ones the nearest to `now`."""
    plain, vector = (scores.view(name, group.count, group.count) for name in ("plain", "vector"))
    if family.units == "orthogonal":
        return UnitsElement(matrix=polar(plain + vector, scores.device))
    signed = family.units == "signed"
    order = assign(plain + (vector.abs() if signed else vector), None if now is None else now.order)
    one = torch.ones(group.count, dtype=torch.float64)
    return UnitsElement(order, signs_of(vector[torch.arange(group.count), order]) if signed else one)


def units_value(group: Units, scores: MatchScores, element: UnitsElement) -> float:
    """<C, element>."""
    plain, vector = (scores.view(name, group.count, group.count) for name in ("plain", "vector"))
    if element.matrix is not None:
        return float(((plain + vector) * element.matrix).sum())
    assert element.order is not None and element.scale is not None
    i = torch.arange(group.count)
    return float((plain[i, element.order] + element.scale * vector[i, element.order]).sum())


def complete(group: Group, family: Family, element: Element | None, name: str, device: torch.device = CPU) -> Element:
    """The element, identity by default, with every part filled in. Raises PlanError if it is not in the family.

    device: checks whether a matrix on units is orthogonal.
    """
    if isinstance(group, Units):
        filled, fits = _complete_units(group, family, element, device)
    else:
        filled, fits = _complete_heads(group, family, element)
    if not fits:
        raise PlanError(
            f"`initial` transforms {name} in a way that this method cannot; start from a transform of the same "
            "method, from permutations, or without one"
        )
    return filled


def _complete_units(
    group: Units, family: Family, element: Element | None, device: torch.device
) -> tuple[Element, bool]:
    start = element if isinstance(element, UnitsElement) else UnitsElement()
    order = torch.arange(group.count) if start.order is None else start.order
    scale = torch.ones(group.count, dtype=torch.float64) if start.scale is None else start.scale.double()
    if family.units != "orthogonal":
        fits = bool(((scale.abs() if family.units == "signed" else scale) == 1).all())
        return UnitsElement(order, scale), start.matrix is None and fits
    matrix = start.matrix
    if matrix is None:
        matrix = torch.eye(group.count, dtype=torch.float64)[order] * scale[:, None]
    square = matrix.shape == (group.count, group.count)
    fits = start.dual is None and square and _are_of_kind("orthogonal", matrix[None], device)
    return UnitsElement(matrix=matrix.double()), fits


def _complete_heads(group: Heads, family: Family, element: Element | None) -> tuple[Element, bool]:
    start = element if isinstance(element, HeadsElement) else HeadsElement()
    one = torch.eye(group.head_dim, dtype=torch.float64).repeat(group.groups, 1, 1)
    query_key = one if start.query_key is None else start.query_key.double()
    value_output = one if start.value_output is None else start.value_output.double()
    queries = torch.arange(group.per_group).repeat(group.groups, 1) if start.queries is None else start.queries
    groups = torch.arange(group.groups) if start.groups is None else start.groups
    fits = _are_of_kind(family.query_key, query_key) and _are_of_kind(family.value_output, value_output)
    return HeadsElement(groups, queries, query_key, value_output), fits


def _are_of_kind(kind: ChoiceKind, matrices: Tensor, device: torch.device = CPU) -> bool:
    """True if all the matrices are of the kind, to 1e-5: each is then its own best match of that kind."""
    matrices = matrices.double()
    nearest = torch.stack([best_matrix(kind, matrix, device) for matrix in matrices])
    return bool(torch.allclose(nearest, matrices, rtol=0, atol=1e-5))


def shorten(element: Element) -> Element | None:
    """The element without the parts that change nothing; None if no part is left."""
    if isinstance(element, UnitsElement):
        scale = element.scale
        unscaled = scale is None or bool((scale == 1).all())
        order = _unless_straight(element.order)
        left: Element = UnitsElement(order, None if unscaled else scale, element.matrix, element.dual)
    else:
        left = HeadsElement(
            _unless_straight(element.groups),
            _unless_straight(element.queries),
            _unless_identity(element.query_key),
            _unless_identity(element.value_output),
        )
    return None if all(part is None for part in vars(left).values()) else left


def _unless_straight(order: Tensor | None) -> Tensor | None:
    return None if order is None or bool((order == torch.arange(order.shape[-1])).all()) else order


def _unless_identity(matrices: Tensor | None) -> Tensor | None:
    return None if matrices is None or bool((matrices == torch.eye(matrices.shape[-1])).all()) else matrices
