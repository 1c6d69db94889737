"""Merge methods once more, in float64 and whole tensors, from their papers' formulas; and the tolerances.

Nothing here knows the package. Two things are float32 by definition and so here too: a delta to the base (its rounded
value is what is ranked and what votes) and the arithmetic's rounding errors, which `assert_close` allows for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]

# Explicit bits of the significand, and exponent of the smallest normal number.
FORMATS = {
    torch.bfloat16: (7, -126),
    torch.float16: (10, -14),
    torch.float32: (23, -126),
    torch.float64: (52, -1022),
}


@dataclass
class Expected:
    """A merge's result. terms: the largest |term| of each element's sum; rounding errors are a fraction of it.

    other: a result that is as good, where a sign vote is too close to call in float32.
    """

    value: Array
    terms: Array
    other: Array | None = None


# Numbers


def ulp(x: npt.ArrayLike, dtype: torch.dtype) -> Array:
    """The distance of neighbouring numbers of `dtype` in the binade of |x|."""
    bits, smallest = FORMATS[dtype]
    magnitude = np.abs(np.asarray(x, np.float64))
    exponent = np.where(magnitude > 0, np.frexp(magnitude)[1] - 1, smallest)
    return np.asarray(np.ldexp(1.0, np.maximum(exponent, smallest) - bits))


def to_bfloat16(x: npt.ArrayLike) -> Array:
    """The nearest bfloat16 of each float64, ties to even, rounded once: integer arithmetic drops the last 45 bits."""
    values = np.ascontiguousarray(x, np.float64)
    bits = values.view(np.uint64)
    half = np.uint64((1 << 44) - 1) + ((bits >> np.uint64(45)) & np.uint64(1))
    rounded = ((bits + half) >> np.uint64(45) << np.uint64(45)).view(np.float64)
    subnormal = np.rint(values * 2.0**133) * 2.0**-133
    rounded = np.where(np.abs(values) < 2.0**-126, subnormal, rounded)
    largest = (2 - 2.0**-7) * 2.0**127
    return np.where(np.abs(rounded) > largest, np.copysign(np.inf, values), rounded)


def rounded(x: npt.ArrayLike, dtype: torch.dtype) -> torch.Tensor:
    """`x` as a tensor of `dtype`, each element rounded once, ties to even."""
    if dtype == torch.bfloat16:
        return torch.from_numpy(to_bfloat16(x)).to(dtype)
    numpy_dtype = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}[dtype]
    return torch.from_numpy(np.asarray(x, np.float64).astype(numpy_dtype))


def doubles(x: torch.Tensor) -> Array:
    """The exact values of a tensor."""
    return x.detach().to(torch.float64).numpy()


def assert_close(actual: torch.Tensor, expected: Expected, arithmetic: torch.dtype = torch.float32) -> None:
    """Allowed: half an ulp of the output's dtype, for its rounding, and 4 of `arithmetic`, of the sum or a term."""
    got = doubles(actual)
    assert got.shape == expected.value.shape
    assert np.isfinite(got).all()
    size = np.maximum(expected.terms, np.abs(expected.value))
    errors = 4 * ulp(size, arithmetic) + 4 * ulp(size, torch.float64)  # the latter are the oracle's
    fits = np.zeros(got.shape, bool)
    for value in (expected.value, expected.other):
        if value is not None:
            rounding = ulp(np.maximum(np.abs(value), np.abs(got)), actual.dtype) / 2
            fits |= np.abs(got - value) <= rounding + errors
    worst = np.abs(got - expected.value).max(initial=0.0)
    assert fits.all(), f"{(~fits).sum()} of {fits.size} elements are off, by at most {worst:.3e}"


# Common to several methods


def delta(x: Array, base: Array, exact: bool = False) -> Array:
    """x - base, rounded to float32 unless `exact` (float64 checkpoints)."""
    return x - base if exact else (x.astype(np.float32) - base.astype(np.float32)).astype(np.float64)


def largest_first(x: Array) -> npt.NDArray[np.intp]:
    """Flat indices by magnitude, descending; equal magnitudes by index, ascending."""
    return np.argsort(-np.abs(x.ravel()), kind="stable")


def keep_positions(x: Array, start: int, stop: int) -> npt.NDArray[np.bool_]:
    """True where the descending rank of the magnitude lies in [start, stop)."""
    mask = np.zeros(x.size, bool)
    mask[largest_first(x)[start:stop]] = True
    return mask.reshape(x.shape)


def largest_term(terms: Sequence[Array], base: Array | float = 0.0) -> Array:
    return np.asarray(np.max([np.abs(t) for t in terms] + [np.broadcast_to(np.abs(base), terms[0].shape)], axis=0))


def sum_terms(coefficients: Sequence[Any], xs: Sequence[Array], base: Array | float = 0.0) -> Expected:
    terms = [c * x for c, x in zip(coefficients, xs, strict=True)]
    return Expected(sum(terms) + base, largest_term(terms, base))


def _in_span(value: Array, xs: Sequence[Array], base: Array | float = 0.0) -> Expected:
    """value + base, where `value` is some combination of `xs`; its terms follow from the smallest coefficients."""
    matrix = np.stack([x.ravel() for x in xs], axis=1)
    coefficients = np.linalg.lstsq(matrix, value.ravel(), rcond=None)[0] if value.size else np.zeros(len(xs))
    terms = [c * x for c, x in zip(coefficients, xs, strict=True)]
    return Expected(value + base, largest_term([*terms, value], base))


# Averages and spheres


def linear(xs: Sequence[Array], weight: Sequence[float], normalize: bool = True) -> Expected:
    """sum w x, over sum w with `normalize`."""
    return sum_terms([w / sum(weight) if normalize else w for w in weight], xs)


def passthrough(xs: Sequence[Array], scale: Sequence[float | None] = (None,)) -> Expected:
    """scale * x."""
    return sum_terms([1.0 if scale[0] is None else scale[0]], xs)


def fisher(
    xs: Sequence[Array], weight: Sequence[float], epsilon: float, normalize: bool, statistics: Sequence[Array]
) -> Expected:
    """sum_i l_i (F_i + e) x_i / sum_i l_i (F_i + e), F_i over its norm with `normalize`; the limit e = 0 of 0 / 0."""
    norms = [np.linalg.norm(f) if normalize else 1.0 for f in statistics]
    shares = np.stack([w * (f / norm + epsilon) for w, norm, f in zip(weight, norms, statistics, strict=True)])
    even = np.broadcast_to(np.reshape(weight, (-1, *[1] * xs[0].ndim)), shares.shape)
    shares = np.where(shares.sum(0) > 0, shares, even)
    value = (shares * np.stack(xs)).sum(0) / shares.sum(0)
    return Expected(np.asarray(value), largest_term(xs))


def slerp(xs: Sequence[Array], t: float) -> Expected:
    """Along the great circle from xs[0] to xs[1]; along the chord where |cos| > 0.9995. Zeros are orthogonal to all."""
    norms = [np.linalg.norm(x) or 1.0 for x in xs]
    cosine = np.clip(np.sum((xs[0] / norms[0]) * (xs[1] / norms[1])), -1, 1)
    if abs(cosine) > 0.9995:
        return sum_terms([1 - t, t], xs)
    angle = np.arccos(cosine)
    return sum_terms([np.sin((1 - t) * angle) / np.sin(angle), np.sin(t * angle) / np.sin(angle)], xs)


def nuslerp(
    xs: Sequence[Array],
    weight: Sequence[float],
    base: Array | None = None,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    exact: bool = False,
) -> Expected:
    """Slerp of the tensors or their deltas by t = w2 / (w1 + w2), also row by row or (`nuslerp_row_wise`) by column."""
    total = weight[0] + weight[1]
    t = weight[1] / total if abs(total) >= 1e-6 * np.abs(weight).sum() else 0.5
    a, b = xs if base is None else [delta(x, base, exact) for x in xs]
    axis = None if nuslerp_flatten or a.ndim < 2 else 0 if nuslerp_row_wise else -1
    norms = [np.sqrt(np.sum(v * v, axis=axis, keepdims=True)) for v in (a, b)]
    norms = [np.where(n == 0, 1.0, n) for n in norms]
    cosine = np.clip(np.sum((a / norms[0]) * (b / norms[1]), axis=axis, keepdims=True), -1, 1)
    straight = 1 - cosine**2 <= 1e-16
    angle = np.arccos(cosine)
    sine = np.where(straight, 1.0, np.sin(angle))
    first = np.where(straight, 1 - t, np.sin((1 - t) * angle) / sine)
    second = np.where(straight, t, np.sin(t * angle) / sine)
    return sum_terms([first, second], [a, b], 0.0 if base is None else base)


def multislerp(
    xs: Sequence[Array],
    weight: Sequence[float],
    base: Array | None = None,
    normalize_weights: bool = True,
    eps: float = 1e-8,
    exact: bool = False,
) -> Expected:
    """The exponential of the mean logarithm at the mean direction, times the mean norm. One input is itself."""
    if len(xs) == 1:
        return Expected(xs[0], np.abs(xs[0]))
    w = [v / sum(weight) for v in weight] if normalize_weights else list(weight)
    vs = list(xs) if base is None else [delta(x, base, exact) for x in xs]
    norms = [float(np.linalg.norm(v)) for v in vs]
    if not any(norms):
        return sum_terms(w, vs, 0.0 if base is None else base)
    units = [v / (n or 1.0) for v, n in zip(vs, norms, strict=True)]
    mean: Array = np.asarray(sum(a * u for a, u in zip(w, units, strict=True)))
    shift = 0.0 if base is None else base
    if np.linalg.norm(mean) < eps:
        assert len(xs) == 2
        return sum_terms(w, vs, shift)
    mean = mean / np.linalg.norm(mean)
    tangent = sum(a * (u - np.sum(u * mean) * mean) for a, u in zip(w, units, strict=True))
    length = float(np.linalg.norm(tangent))
    point = np.cos(length) * mean + np.sinc(length / np.pi) * tangent
    return _in_span(point * sum(a * n for a, n in zip(w, norms, strict=True)), vs, shift)


def karcher(
    xs: Sequence[Array], weight: Sequence[float] | None = None, max_iter: int = 10, tol: float = 1e-5
) -> Expected:
    """The weighted Riemannian mean of the directions, times the weighted mean norm of all inputs.

    A direction opposite to the current point has no logarithm there and does not move it.
    """
    shares = np.asarray(weight if weight is not None else [1.0] * len(xs), np.float64)
    shares = shares / shares.sum()
    norms = np.array([np.linalg.norm(x) for x in xs])
    used = [i for i in range(len(xs)) if norms[i] > 0 and shares[i] > 0]
    if not used:
        return Expected(np.zeros_like(xs[0]), largest_term(xs))
    units = [xs[i] / norms[i] for i in used]
    a = shares[used] / shares[used].sum()
    point = sum(s * u for s, u in zip(a, units, strict=True))
    point = units[0] if np.linalg.norm(point) < tol else point / np.linalg.norm(point)
    for _ in range(max_iter):
        step = np.zeros_like(point)
        for s, u in zip(a, units, strict=True):
            cosine = np.clip(np.sum(u * point), -1, 1)
            angle = np.arccos(cosine)
            stretch = 0.0 if cosine < -1 + 1e-12 else angle / np.sin(angle) if angle > 0 else 1.0
            step += s * stretch * (u - cosine * point)
        length = np.linalg.norm(step)
        if length < tol:
            break
        point = np.cos(length) * point + np.sin(length) * step / length
        point /= np.linalg.norm(point)
    return _in_span(point * float(shares @ norms), xs)


def nearswap(xs: Sequence[Array], t: float) -> Expected:
    """g x + (1 - g) base with g = min(1, t / |base - x|), for xs = [base, x]."""
    base, x = xs
    size = np.abs(delta(x, base, exact=True))
    g = np.minimum(1.0, np.divide(t, size, out=np.ones_like(size), where=size > 0))
    return sum_terms([g, 1 - g], [x, base])


def arcee_fusion(xs: Sequence[Array]) -> Expected:
    """x where |x - base| KL(softmax(x) || softmax(base)) of the row is at least the threshold, else the base.

    The threshold is median + 1.5 (third - first quartile) of these products, all of them, at index int(q (n - 1)).
    """
    base, x = xs
    if not base.size:
        return Expected(base, base)
    p, q = (np.exp(v - v.max(-1, keepdims=True)) if v.ndim else np.ones(1) for v in (x, base))
    p, q = (v / v.sum(-1, keepdims=True) + 1e-8 for v in (p, q))
    divergence = (p * np.log(p / q)).sum(-1, keepdims=True)
    products = np.reshape(np.abs(x - base) * divergence, base.shape)
    ordered = np.sort(products.ravel())
    first, median, third = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
    limit = median + 1.5 * (third - first)
    noise = 1e-13 * float(np.abs(x - base).max()) + 1e-6 * limit  # of the divergence, and of float32 differences
    near = np.abs(products - limit) <= noise
    value = np.where(products >= limit, x, base)
    return Expected(value, np.abs(value), np.where(near, np.where(products >= limit, base, x), value))


def model_stock(
    xs: Sequence[Array], base: Array, filter_wise: bool = False, exact: bool = False, **more: Any
) -> Expected:
    """base + lambda t (mean - base), t = n c / (1 + (n - 1) c), or 0 for 0/0; c: mean cosine over pairs of deltas."""
    ds = [delta(x, base, exact) for x in xs]
    axis = -1 if filter_wise and base.ndim > 1 else None
    cosines = []
    for i, d in enumerate(ds):
        for e in ds[:i]:
            product = np.sum(d * e, axis=axis, keepdims=True)
            norms = [np.sqrt(np.sum(v * v, axis=axis, keepdims=True)) for v in (d, e)]
            together = np.where(norms[0] * norms[1] == 0, 1.0, norms[0] * norms[1])
            cosines.append(np.clip(product / together, -1, 1))
    c, n = np.mean(cosines, axis=0), len(xs)
    below = 1 + (n - 1) * c
    t = np.where(np.abs(below) < 1e-6, 0.0, n * c / np.where(np.abs(below) < 1e-6, 1.0, below))
    return sum_terms([more.get("lambda", 1.0) * t / n] * n, ds, base)


# Whole matrices


def tsv(deltas: Sequence[Array]) -> Array:
    """TSV-Merge as its authors compute it: the first r/n triples of each delta, zero-padded to r columns, whitened."""
    r, count = min(deltas[0].shape), len(deltas)
    k = max(1, r // count)
    left, right = (np.zeros((side, max(r, count))) for side in deltas[0].shape)
    values = np.zeros(max(r, count))
    for i, delta in enumerate(deltas):
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        here = slice(i * k, (i + 1) * k)
        left[:, here], values[here], right[:, here] = u[:, :k], s[:k], vt[:k].T
    white = []
    for stacked in (left, right):
        u, _, vt = np.linalg.svd(stacked, full_matrices=False)
        white.append(u @ vt)
    return np.asarray(white[0] @ np.diag(values) @ white[1].T)


def iso_c(deltas: Sequence[Array]) -> Array:
    """Iso-C: the sum of the deltas with all singular values replaced by their mean."""
    u, s, vt = np.linalg.svd(np.sum(deltas, axis=0), full_matrices=False)
    return np.asarray(s.mean() * u @ vt)


# Task vectors


@dataclass
class TaskVectors:
    """One method of the family: the kept entries, the election of signs, and its defaults."""

    keep: Callable[..., npt.NDArray[np.bool_]]
    vote: bool
    normalize: bool
    rescale: bool | str

    def __call__(
        self,
        xs: Sequence[Array],
        weight: Sequence[float],
        base: Array,
        density: Sequence[float] | None = None,
        normalize: bool | None = None,
        rescale: bool | str | None = None,
        exact: bool = False,
        **more: Any,
    ) -> Expected:
        """base + lambda * sum(w s m d) over the elected entries; s restores the L1 norm, or divides by the density."""
        ds = [delta(x, base, exact) for x in xs]
        densities = density if density is not None else [1.0] * len(xs)
        own = {key: value for key, value in more.items() if key in ("gamma", "mask")}
        masks = [np.ones(d.shape, bool) for d in ds]
        for i, share in enumerate(densities):
            if share < 1:
                masks[i] = self.keep(ds[i], share, **{key: values[i] for key, values in own.items()})
        scaling = self.rescale if rescale is None else rescale
        scales = [self._scale(d, mask, share, scaling) for d, mask, share in zip(ds, masks, densities, strict=True)]
        terms = [w * s * d * m for w, s, d, m in zip(weight, scales, ds, masks, strict=True)]
        by_weight = self.normalize if normalize is None else normalize
        return self._combine(terms, weight, base, by_weight, more.get("lambda", 1.0), more.get("zeros", 1.0))

    def _scale(self, d: Array, mask: npt.NDArray[np.bool_], density: float, rescale: bool | str) -> float:
        """The factor that restores the L1 norm, or the inverse density; 1 if nothing could be dropped."""
        if not rescale or density >= 1 or (mask.all() and self.keep is not _keep_given):
            return 1.0
        if rescale == "density":
            return 1 / density
        norms = float(np.abs(d).sum()), float(np.abs(d * mask).sum())
        return norms[0] / norms[1] if norms[1] > 0 else 1.0

    def _combine(
        self, terms: list[Array], weight: Sequence[float], base: Array, normalize: bool, factor: float, zeros: float
    ) -> Expected:
        if not self.vote:
            return sum_terms([factor / (sum(weight) if normalize else 1.0)] * len(terms), terms, base)
        total = sum(terms)
        elected = np.where(total == 0, zeros, np.sign(total))
        merged = [mean_of_sign(terms, weight, sign, normalize, factor) for sign in (elected, -elected)]
        close = np.abs(total) <= 4 * ulp(largest_term(terms), torch.float32)
        biggest = np.max([np.abs(part) for _, parts in merged for part in parts], axis=0)
        other = np.where(close, merged[1][0] + base, merged[0][0] + base)
        return Expected(merged[0][0] + base, np.maximum(biggest, np.abs(base)), other)


def mean_of_sign(
    terms: list[Array], weight: Sequence[float], sign: Array, normalize: bool, factor: float
) -> tuple[Array, list[Array]]:
    """The mean or sum of the terms of that sign, and its parts."""
    agree = [np.sign(e) == sign for e in terms]
    divisor = sum(w * m for w, m in zip(weight, agree, strict=True)) if normalize else np.ones_like(sign)
    divisor = np.where(divisor == 0, 1.0, divisor)
    parts = [factor * e * m / divisor for e, m in zip(terms, agree, strict=True)]
    return sum(parts), parts


def _keep_largest(d: Array, density: float) -> npt.NDArray[np.bool_]:
    return keep_positions(d, 0, max(1, int(density * d.size)))


def _keep_middle(d: Array, density: float, gamma: float = 0.01) -> npt.NDArray[np.bool_]:
    target = int(density * d.size)
    below = max(0, d.size - target - int(gamma * d.size))
    return keep_positions(d, d.size - below - target, d.size - below)


def _keep_given(_d: Array, _density: float, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    return mask


task_arithmetic = TaskVectors(_keep_largest, vote=False, normalize=False, rescale=False)
ties = TaskVectors(_keep_largest, vote=True, normalize=True, rescale=False)
dare_linear = TaskVectors(_keep_given, vote=False, normalize=False, rescale=True)
dare_ties = TaskVectors(_keep_given, vote=True, normalize=False, rescale=True)
breadcrumbs = TaskVectors(_keep_middle, vote=False, normalize=False, rescale=False)
della = TaskVectors(_keep_given, vote=True, normalize=True, rescale=True)
della_linear = TaskVectors(_keep_given, vote=False, normalize=False, rescale=True)
breadcrumbs_ties = TaskVectors(_keep_middle, vote=True, normalize=False, rescale=False)


def ties_global(
    models: Sequence[dict[str, Array]], base: dict[str, Array], weight: Sequence[float], density: float, factor: float
) -> dict[str, Expected]:
    """TIES as its authors' code does it: over the flat vector of all tensors, "dis-mean".

    Entries at or above the k-th smallest magnitude stay, k = d - int(d * density), equal ones included. An element
    whose sum is zero takes the sign of the sum of all elements' signs.
    """
    names = list(base)
    flat = [np.concatenate([delta(model[n], base[n]).ravel() for n in names]) for model in models]
    k = flat[0].size - int(flat[0].size * density)
    kept = [d * (np.abs(d) >= np.sort(np.abs(d))[k - 1]) for d in flat]
    terms = [w * d for w, d in zip(weight, kept, strict=True)]
    majority = np.sign(np.sign(sum(terms)).sum()) or -1.0
    whole = np.concatenate([base[n].ravel() for n in names])
    result = ties._combine(terms, weight, whole, True, factor, majority)
    assert result.other is not None
    ends = np.cumsum([base[n].size for n in names])[:-1]
    parts = zip(*(np.split(part, ends) for part in (result.value, result.terms, result.other)), strict=True)
    return {n: Expected(*(p.reshape(base[n].shape) for p in part)) for n, part in zip(names, parts, strict=True)}
