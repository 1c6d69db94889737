"""Second moments of a layer's inputs. With them an edit leaves other inputs' outputs alone."""

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
    """E[k k^T] of every site's inputs, [in, in], with `ridge` times the mean of its diagonal added to the diagonal.

    They stay on the CPU: a GPU may have room for only one at a time. stored: the checkpoint's names of the sites'
    weights. content: the checkpoint's, None if unknown. Raises PlanError if a site has no matrix, or one of another
    model, shape or kind.
    """
    if isinstance(given, str) and given == "identity":
        return [_add_ridge(torch.eye(site.inputs, dtype=dtype), ridge) for site in sites]
    if given is None or isinstance(given, str):
        raise PlanError(
            f"the covariance is {given!r}, expected second moments of the layers' inputs. Collect them with "
            '`mergekit-lfm stats gram MODEL --data FILE`, or edit without them ("identity")'
        )
    if isinstance(given, Statistics):
        given = _read_statistics(given, sites, stored, content)
    matrices, problems = [], []
    for site in sites:
        names = (site.layer, stored[site.weight], site.weight, site.weight.removesuffix(".weight"))
        by_name: Mapping[Any, Tensor] = given
        matrix = next((by_name[name] for name in names if name in by_name), None)
        if matrix is None:
            problems.append(f"layer {site.layer} ({stored[site.weight]}) has no matrix")
        elif tuple(matrix.shape) != (site.inputs, site.inputs):
            problems.append(f"the matrix of layer {site.layer} is {list(matrix.shape)}, not {[site.inputs] * 2}")
        elif not bool(matrix.isfinite().all()):
            problems.append(f"the matrix of layer {site.layer} is not finite")
        else:
            matrices.append(_add_ridge(matrix.to("cpu", dtype), ridge))
    if problems:
        raise PlanError(
            "the covariance does not fit the layers to edit:\n  "
            + "\n  ".join(problems)
            + "\nCollect it for these layers with `mergekit-lfm stats gram`"
        )
    return matrices


def _read_statistics(
    gram: Statistics, sites: Sequence[Site], stored: Mapping[str, str], content: str | None
) -> dict[str, Tensor]:
    """A statistics file's matrices by weight, without the row and column of the appended 1."""
    facts = gram.info
    if facts.kind != "gram":
        raise PlanError(f"{gram.path} holds {facts.kind} statistics, expected gram. Use `stats gram`")
    if content is not None and facts.models[0] != content:
        raise PlanError(
            f"{gram.path} was collected on another model: on content {facts.models[0]}, this one has {content}. "
            "Name the right file, or collect this model's statistics with `mergekit-lfm stats gram`"
        )
    wanted = {stored[site.weight] for site in sites}
    return {weight: gram.read(name)[:-1, :-1] for weight, (name, _) in gram.by_weight.items() if weight in wanted}


def _add_ridge(matrix: Tensor, ridge: float) -> Tensor:
    symmetric = (matrix + matrix.mT) / 2
    return symmetric + ridge * symmetric.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


def solve(matrix: Tensor, right: Tensor, label: object) -> Tensor:
    """matrix^-1 right by Cholesky. Raises PlanError unless the matrix is symmetric positive definite."""
    factor, wrong = torch.linalg.cholesky_ex(matrix)
    if int(wrong):
        raise PlanError(
            f"the second moments of {label} are singular (to order {int(wrong)} of {len(matrix)}): the layer has more "
            "inputs than the data have directions. Give a larger ridge, such as 1e-3, or collect on more text"
        )
    solved: Tensor = torch.cholesky_solve(right, factor)
    return solved
