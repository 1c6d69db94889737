"""The code of each algorithm's declaration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mergekit_lfm.meta.edits import Editable, Edits
from mergekit_lfm.meta.episodes import Episodes
from mergekit_lfm.meta.film import Film, NamedEpisodes
from mergekit_lfm.meta.groups import Groups
from mergekit_lfm.meta.losses import NOTHING, Inner, LearnedRates, MetaLoss, Reptile, Scales
from mergekit_lfm.meta.metric import Prototypes, Relation
from mergekit_lfm.meta.optimiser import LearnedSteps
from mergekit_lfm.meta.regulated import Regulated
from mergekit_lfm.meta.stream import Continual, Stream
from mergekit_lfm.methods.method import Value
from mergekit_lfm.recipe.meta_algorithms import Algorithm
from mergekit_lfm.train.examples import Examples

NO_NAMES: Mapping[int, Tensor] = {}

# Algorithms with code of their own; the others are `MetaLoss`, by what their declarations say.
OWN: Mapping[str, type[MetaLoss]] = {
    "metasgd": LearnedRates,
    "mtl": Scales,
    "reptile": Reptile,
    "proto": Prototypes,
    "relation": Relation,
    "film": Film,
    "meta_lstm": LearnedSteps,
    "mgml": Groups,
    "continual": Continual,
    "editable": Editable,
    "gram": Regulated,
}


def build_loss(
    model: nn.Module,
    task: str,
    row: Algorithm,
    inner: Inner,
    head: frozenset[str] = frozenset(),
    settings: Mapping[str, Value] = NOTHING,
) -> MetaLoss:
    """The loss of an algorithm, for a model; what is learned beside the model becomes a part of it."""
    return OWN.get(row.name, MetaLoss)(model, task, row, inner, head, settings)


def make_episodes(
    row: Algorithm,
    settings: Mapping[str, Value],
    examples: Examples,
    names: Mapping[int, Tensor] = NO_NAMES,
    **sizes: Any,
) -> Episodes:
    """The episodes that an algorithm learns from.

    names: the vectors of classes' names, by label, for one that compares with them. sizes: ways, shots, queries and
    seed, of `Episodes`.
    """
    if row.named:
        return NamedEpisodes(examples, names=names, **sizes)
    if row.kind == "stream":
        return Stream(examples, stay=float(settings["stay"] or 0.0), **sizes)
    return (Edits if row.kind == "edits" else Episodes)(examples, **sizes)
