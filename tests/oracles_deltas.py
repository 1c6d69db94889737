"""Merges of deltas other than `oracles.TaskVectors`, in float64 and whole tensors, from their papers' formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from oracles import Array, Expected, delta, keep_positions, largest_term, mean_of_sign, sum_terms, ulp


def _signed(deltas: Sequence[Array], weight: Sequence[float], factor: float, base: Array) -> Expected:
    """base + factor * the weighted mean of the deltas that have the sign of their plain sum, of 0 plus."""
    total = np.sum(deltas, axis=0)
    elected = np.where(total < 0, -1.0, 1.0)
    terms = [w * d for w, d in zip(weight, deltas, strict=True)]
    merged = [mean_of_sign(terms, weight, sign, True, factor) for sign in (elected, -elected)]
    close = np.abs(total) <= 4 * ulp(largest_term(deltas), torch.float32)
    biggest = np.max([np.abs(part) for _, parts in merged for part in parts], axis=0)
    other = np.where(close, merged[1][0] + base, merged[0][0] + base)
    return Expected(merged[0][0] + base, np.maximum(biggest, np.abs(base)), other)


def sce(xs: Sequence[Array], base: Array, select_topk: float = 1.0, exact: bool = False, **more: Any) -> Expected:
    """Keep the top share of the varying elements by variance; weigh by mean squares; the mean of the elected sign."""
    deltas = [delta(x, base, exact) for x in xs]
    if select_topk < 1:
        pairs = [
            (d - e) ** 2 for i, d in enumerate(deltas) for e in deltas[:i]
        ]  # n^2 times the variance, of equal sums
        variance = np.sum(pairs, axis=0) if pairs else np.zeros_like(base)
        mask = keep_positions(variance, 0, int(np.count_nonzero(variance) * select_topk))
        deltas = [d * mask for d in deltas]
    squares = np.array([np.sum(d * d) for d in deltas])
    weight = squares / squares.sum() if squares.sum() > 0 else np.full(len(xs), 1 / len(xs))
    return _signed(deltas, weight.tolist(), more.get("lambda", 1.0), base)


def ram(
    xs: Sequence[Array],
    base: Array,
    epsilon: float = 1e-5,
    r: float = 0.0,
    alpha: float = 0.0,
    exact: bool = False,
    **more: Any,
) -> Expected:
    """base + sum_i d_i a_i (lam_i [c = 1] + [c > 1] / c), a_i = |d_i| > epsilon, c = sum a_i.

    lam_i = 1 + r min(alpha, #(a_i, c > 1) / #(a_i, c = 1)); 1 without r.
    """
    deltas = [delta(x, base, exact) for x in xs]
    active = [np.abs(d) > epsilon for d in deltas]
    count = np.sum(active, axis=0)
    shares = []
    for a in active:
        shared, alone = int((a & (count > 1)).sum()), int((a & (count == 1)).sum())
        rho = min(alpha, shared / alone) if alone else 0.0  # alone = 0: a factor of nothing
        shares.append(np.where(a, np.where(count == 1, 1 + r * rho, 1 / np.maximum(count, 1)), 0.0))
    return sum_terms([more.get("lambda", 1.0) * share for share in shares], deltas, base)


def ramplus_tl(xs: Sequence[Array], base: Array, r: float = 0.1, alpha: float = 0.2, **more: Any) -> Expected:
    """RAM+ over one tensor."""
    return ram(xs, base, r=r, alpha=alpha, **more)


def magmax(xs: Sequence[Array], base: Array, exact: bool = False, **more: Any) -> Expected:
    """base + lambda * the delta of largest magnitude, the last one among equals."""
    deltas = np.stack([delta(x, base, exact) for x in xs])
    last = len(xs) - 1 - np.argmax(np.abs(deltas[::-1]), axis=0)
    return sum_terms([more.get("lambda", 0.5)], [np.take_along_axis(deltas, last[None], 0)[0]], base)


def consensus(
    xs: Sequence[Array], base: Array, threshold: Sequence[float], agree: int = 2, exact: bool = False, **more: Any
) -> Expected:
    """base + lambda * sum_i d_i where at least `agree` masks |d_i| > threshold_i |sum - d_i| are true."""
    deltas = [delta(x, base, exact) for x in xs]
    total, factor = np.sum(deltas, axis=0), more.get("lambda", 1.0)
    margins = [np.abs(d) - t * np.abs(total - d) for d, t in zip(deltas, threshold, strict=True)]
    noise = 8 * ulp(largest_term(deltas) * (1 + max(threshold)), torch.float32)
    most, least = (np.sum([m > side * noise for m in margins], axis=0) >= agree for side in (-1, 1))
    value = np.where(np.sum([m > 0 for m in margins], axis=0) >= agree, factor * total, 0.0)
    other = np.where(most != least, factor * total - value, value)
    return Expected(value + base, np.maximum(largest_term(deltas, base), np.abs(factor * total)), other + base)


def negmerge(xs: Sequence[Array], base: Array, exact: bool = False, **more: Any) -> Expected:
    """base - lambda * the mean of the deltas where all are above 0, or all below."""
    deltas = [delta(x, base, exact) for x in xs]
    agreed = np.all([d > 0 for d in deltas], axis=0) | np.all([d < 0 for d in deltas], axis=0)
    return sum_terms([-more.get("lambda", 1.0) / len(xs) * agreed] * len(xs), deltas, base)


def expo(xs: Sequence[Array], base: Array, alpha: float, exact: bool = False) -> Expected:
    """x + alpha (x - base), as base + (1 + alpha) d."""
    return sum_terms([1 + alpha], [delta(xs[0], base, exact)], base)


def pcb(xs: Sequence[Array], base: Array, density: float = 0.1, exact: bool = False, **more: Any) -> Expected:
    """PCB-Merging as its authors compute it over one flat vector, with tanh(z) = z and scores of at least 0."""
    deltas = np.stack([delta(x, base, exact).ravel() for x in xs])
    n, numel = deltas.shape
    if not numel:
        return Expected(base, base)
    ordered = np.sort(np.abs(deltas), axis=1)
    low, high = ordered[:, [int(numel * 1e-4)]], ordered[:, [int(numel * (1 - 1e-4) - 1)]]
    size = np.clip(np.abs(deltas), low, high)
    part = _zero_to_one(size, low, high)
    score = np.exp(n * part**2) * np.maximum(deltas * deltas.sum(axis=0), 0)
    ordered = np.sort(score, axis=1)
    floor, top = ordered[:, [min(numel - 1, int(numel * (1 - density)))]], ordered[:, [-1]]
    weight = _zero_to_one(np.maximum(score, floor), floor, top)
    total = weight.sum(axis=0)
    merged = (weight * np.sign(deltas) * size).sum(axis=0) / np.where(total > 0, total, 1.0)
    value = more.get("lambda", 1.2) * merged.reshape(base.shape)
    return Expected(value + base, np.maximum(np.abs(value), np.abs(base)))


def _zero_to_one(x: Array, low: Array, high: Array) -> Array:
    """x from low to high as 0 to 1; 0 if these are equal."""
    return np.asarray((x - low) / np.where(high > low, high - low, 1.0))
