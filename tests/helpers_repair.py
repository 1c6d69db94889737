"""Helpers for tests of repair: the moments of units, measured in float64 by hooks of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def observed(model: nn.Module, inputs: Sequence[Any], names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of the units' outputs in the layers, over all examples and places, float64."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = []
    for name in names:
        module = model.get_submodule(name)
        axis = 1 if isinstance(module, nn.Conv2d) else -1
        handles.append(
            module.register_forward_hook(
                lambda _m, _a, y, name=name, axis=axis: seen[name].append(y.double().movedim(axis, 0).flatten(1))
            )
        )
    with torch.no_grad():
        for x in inputs:
            model(**x) if isinstance(x, dict) else model(x)
    for handle in handles:
        handle.remove()
    rows = {name: torch.cat(parts, dim=1) for name, parts in seen.items()}
    return {name: (x.mean(1), x.std(1, correction=0)) for name, x in rows.items()}


def assert_repaired(
    merged: nn.Module,
    ends: Sequence[nn.Module],
    inputs: Sequence[Any],
    names: Sequence[str],
    weights: Sequence[float] = (0.5, 0.5),
    tolerance: float = 1e-5,
) -> None:
    """Assert that every unit's mean and standard deviation are the weighted means of the ends', relative to these."""
    found = observed(merged, inputs, names)
    of_ends = [observed(end, inputs, names) for end in ends]
    for name in names:
        mean, std = (sum(w * end[name][i] for w, end in zip(weights, of_ends, strict=True)) for i in (0, 1))
        assert isinstance(std, Tensor)
        assert float(((found[name][0] - mean).abs() / std).max()) < tolerance, name
        assert float(((found[name][1] - std).abs() / std).max()) < tolerance, name
