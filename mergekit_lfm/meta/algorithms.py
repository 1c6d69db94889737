"""The code of each algorithm's declaration."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from mergekit_lfm.meta.losses import Inner, LearnedRates, MetaLoss, Reptile, Scales
from mergekit_lfm.meta.metric import Prototypes, Relation
from mergekit_lfm.recipe.meta_algorithms import Algorithm

# Algorithms with code of their own; the others are `MetaLoss`, by what their declarations say.
OWN: Mapping[str, type[MetaLoss]] = {
    "metasgd": LearnedRates,
    "mtl": Scales,
    "reptile": Reptile,
    "proto": Prototypes,
    "relation": Relation,
}


def build_loss(
    model: nn.Module, task: str, row: Algorithm, inner: Inner, head: frozenset[str] = frozenset()
) -> MetaLoss:
    """The loss of an algorithm, for a model; what is learned beside the model becomes a part of it."""
    return OWN.get(row.name, MetaLoss)(model, task, row, inner, head)
