"""What else a layer's inputs are: their second moments, by which an edit leaves alone what it is not about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_lfm.artifacts.statistics import Statistics
from mergekit_lfm.edit.sites import Site
from mergekit_lfm.errors import PlanError

Covariance = Mapping[Any, Tensor] | Statistics | str | None  # by layer number or weight; "identity"


def second_moments(
    given: Covariance,
    sites: Sequence[Site],
    stored: Mapping[str, str],
    content: str | None,
    *,
    ridge: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """E[k k^T] of every site's inputs, [in, in], with `ridge` times the mean of its diagonal added to that.

    They lie on the CPU: a GPU may have room for one at a time only. stored: the sites' weights as the checkpoint names
    them. content: the checkpoint's, None where unknown. PlanError where there is none for a site, or of another model,
    shape or kind.
    """
    if isinstance(given, str) and given == "identity":
        return [_ridged(torch.eye(site.inputs, dtype=dtype), ridge) for site in sites]
    if given is None or isinstance(given, str):
        raise PlanError(
            f"found {given!r} as the covariance, expected second moments of the layers' inputs; collect them with "
            '`mergekit-lfm stats gram MODEL --data FILE`, or edit without them ("identity")'
        )
    if isinstance(given, Statistics):
        given = _of_statistics(given, sites, stored, content)
    found, problems = [], []
    for site in sites:
        names = (site.layer, stored[site.weight], site.weight, site.weight.removesuffix(".weight"))
        held: Mapping[Any, Tensor] = given
        matrix = next((held[name] for name in names if name in held), None)
        if matrix is None:
            problems.append(f"there is none for layer {site.layer} ({stored[site.weight]})")
        elif tuple(matrix.shape) != (site.inputs, site.inputs):
            problems.append(f"that of layer {site.layer} is {list(matrix.shape)}, not {[site.inputs] * 2}")
        elif not bool(matrix.isfinite().all()):
            problems.append(f"that of layer {site.layer} is not finite")
        else:
            found.append(_ridged(matrix.to("cpu", dtype), ridge))
    if problems:
        raise PlanError(
            "the covariance does not fit the layers to edit:\n  "
            + "\n  ".join(problems)
            + "\ncollect it for these layers with `mergekit-lfm stats gram`"
        )
    return found


def _of_statistics(
    given: Statistics, sites: Sequence[Site], stored: Mapping[str, str], content: str | None
) -> dict[str, Tensor]:
    """The matrices of a statistics file, by weight, without the row and column of the appended 1."""
    facts = given.facts
    if facts.kind != "gram":
        raise PlanError(f"{given.path} holds {facts.kind} statistics, expected gram; collect them with `stats gram`")
    if content is not None and facts.models[0] != content:
        raise PlanError(
            f"{given.path} was collected on another model: it is of content {facts.models[0]}, this one has {content}; "
            "name the right file, or collect the statistics of this model with `mergekit-lfm stats gram`"
        )
    wanted = {stored[site.weight] for site in sites}
    return {weight: given.read(name)[:-1, :-1] for weight, (name, _) in given.by_weight.items() if weight in wanted}


def _ridged(matrix: Tensor, ridge: float) -> Tensor:
    symmetric = (matrix + matrix.mT) / 2
    return symmetric + ridge * symmetric.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


def solve(matrix: Tensor, right: Tensor, label: object) -> Tensor:
    """matrix^-1 right, of a symmetric positive definite matrix, by Cholesky. PlanError where it is not."""
    factor, wrong = torch.linalg.cholesky_ex(matrix)
    if int(wrong):
        raise PlanError(
            f"the second moments of {label} are singular (to order {int(wrong)} of {len(matrix)}): the layer has more "
            "inputs than the data have directions. Give a larger ridge, such as 1e-3, or collect them on more text"
        )
    solved: Tensor = torch.cholesky_solve(right, factor)
    return solved
