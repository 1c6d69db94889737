"""Random elements of a table's groups: tests plant them, and the check of a table rewrites a model with them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from mergekit_lfm.arch.table import Heads, QueryKey, Symmetries, Units
from mergekit_lfm.artifacts.transform import Element, Gain, HeadsElement, Transform, TransformInfo, UnitsElement
from mergekit_lfm.errors import PlanError

ElementKind = Literal["order", "scale", "rotation", "inside"]
ELEMENT_KINDS: tuple[ElementKind, ...] = ("order", "scale", "rotation", "inside")


def random_transform(
    tensors: Mapping[str, Tensor], symmetries: Symmetries, *, seed: int, kinds: Collection[ElementKind] = ELEMENT_KINDS
) -> Transform:
    """A random element of every group, of these kinds: it changes the tensors, but not the outputs.

    "order": units, heads, and query heads within their group change places. "scale": factors from 1/2 to 2, with the
    signs that the group allows. "rotation": in place of order and scale if the group allows one; new gains are random,
    from 1/2 to 3/2. "inside": matrices within heads. tensors: the norms' old gains among them. The same seed gives the
    same transform. Raises PlanError if a gain is missing.
    """
    draw = torch.Generator().manual_seed(seed)
    return Transform(symmetries, *elements_of(tensors, symmetries, symmetries.groups, kinds, draw))


def elements_of(
    tensors: Mapping[str, Tensor],
    symmetries: Symmetries,
    groups: Iterable[str],
    kinds: Collection[ElementKind],
    draw: torch.Generator,
) -> tuple[dict[str, Element], TransformInfo, dict[str, Gain]]:
    """The elements, facts and gains of a transform that acts on these groups only."""
    elements: dict[str, Element] = {}
    gains: dict[str, Gain] = {}
    for name in groups:
        group = symmetries.groups[name]
        if isinstance(group, Heads):
            elements[name] = random_heads(group, kinds, draw)
        else:
            elements[name] = random_units(group, kinds, draw)
            if "rotation" in kinds and group.rotation:
                gains |= random_gains(tensors, symmetries, name, draw)
    return elements, TransformInfo("random", options={"kinds": sorted(kinds)}), gains


def random_units(group: Units, kinds: Collection[ElementKind], draw: torch.Generator) -> UnitsElement:
    """A random element of a `Units` group."""
    if "rotation" in kinds and group.rotation:
        return UnitsElement(matrix=random_rotation(group.count, draw, keep_ones=group.rotation == "centred"))
    return UnitsElement(
        order=random_order(group.count, draw) if "order" in kinds else None,
        scale=random_scale(group, draw) if "scale" in kinds and group.scale else None,
    )


def random_scale(group: Units, draw: torch.Generator) -> Tensor:
    """Factors of the kind that the group allows, float64 [n]."""
    factors = _factors((group.count,), draw)
    if group.scale == "sign":
        return random_signs((group.count,), draw)
    return factors if group.scale == "positive" else factors * random_signs((group.count,), draw)


def random_heads(group: Heads, kinds: Collection[ElementKind], draw: torch.Generator) -> HeadsElement:
    """A random element of a `Heads` group."""
    ordered, inside = "order" in kinds, "inside" in kinds
    shape = (group.groups, group.head_dim)
    return HeadsElement(
        groups=random_order(group.groups, draw) if ordered else None,
        queries=torch.stack([random_order(group.per_group, draw) for _ in range(group.groups)]) if ordered else None,
        query_key=random_query_key(group, group.query_key, draw) if inside else None,
        value_output=random_matrices(*shape, draw) if inside else None,
    )


def random_query_key(
    group: Heads, family: QueryKey, draw: torch.Generator
) -> Tensor | None:  # [groups, head_dim, head_dim]
    """Random matrices that act on keys inside heads, of any family, not only the group's own; None for "fixed"."""
    if family == "fixed":
        return None
    if family == "linear":
        return random_matrices(group.groups, group.head_dim, draw)
    shape = (group.groups, group.head_dim // 2)
    if family == "signs":
        real, imaginary = random_signs(shape, draw), torch.zeros(shape, dtype=torch.float64)
    else:
        factors, angles = _factors(shape, draw), 2 * math.pi * _uniform(shape, draw)
        real, imaginary = factors * angles.cos(), factors * angles.sin()
    return torch.cat(
        [
            torch.cat([torch.diag_embed(real), torch.diag_embed(-imaginary)], 2),
            torch.cat([torch.diag_embed(imaginary), torch.diag_embed(real)], 2),
        ],
        1,
    )


def random_gains(
    tensors: Mapping[str, Tensor], symmetries: Symmetries, group: str, draw: torch.Generator
) -> dict[str, Gain]:
    """The old gain and a random new one for every norm of the group. Raises PlanError if tensors lack a gain."""
    gains = {}
    for tensor, axis in symmetries.uses(group):
        for part in symmetries.tensors[tensor][axis]:
            if part.view == "gain" and part.norm:
                if tensor not in tensors:
                    raise PlanError(f"{tensor}, the gain of {part.norm} in the table, is missing; pass it too")
                old = tensors[tensor].double()
                gains[part.norm] = Gain(old, 0.5 + _uniform(tuple(old.shape), draw))
    return gains


def random_order(n: int, draw: torch.Generator) -> Tensor:
    """A permutation, int64 [n], other than the identity unless n = 1."""
    order = torch.randperm(n, generator=draw)
    while n > 1 and bool((order == torch.arange(n)).all()):
        order = torch.randperm(n, generator=draw)
    return order


def random_signs(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Random 1 and -1, float64; both occur along the last axis if it is longer than 1."""
    signs = torch.randint(2, shape, generator=draw).double() * 2 - 1
    signs[..., 0] = -1
    signs[..., 1:2] = 1
    return signs


def random_rotation(n: int, draw: torch.Generator, *, keep_ones: bool = False) -> Tensor:
    """A uniformly random orthogonal matrix, float64 [n, n]; with keep_ones among those that keep the vector of ones.

    Source: Mezzadri 2007 (math-ph/0609050), section 5: QR of a normal matrix, with the signs of R's diagonal.
    """
    if keep_ones:
        basis = torch.eye(n, dtype=torch.float64)
        basis[:, 0] = 1
        basis = torch.linalg.qr(basis)[0]  # the first column is along the ones
        inner = torch.eye(n, dtype=torch.float64)
        inner[1:, 1:] = random_rotation(n - 1, draw)
        kept: Tensor = basis @ inner @ basis.T
        return kept
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=draw))
    rotation: Tensor = q * r.diagonal().sign()
    return rotation


def random_matrices(count: int, n: int, draw: torch.Generator) -> Tensor:
    """Random invertible matrices, float64 [count, n, n], with singular values from 1/2 to 2."""
    left, right = (torch.stack([random_rotation(n, draw) for _ in range(count)]) for _ in range(2))
    return left * _factors((count, 1, n), draw) @ right


def _factors(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Random factors from 1/2 to 2."""
    return 2 ** (2 * _uniform(shape, draw) - 1)


def _uniform(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=draw)
