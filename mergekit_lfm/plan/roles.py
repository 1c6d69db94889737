"""The roles of the models of a part of a recipe: what a plan's sources are for its tensors."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_lfm.artifacts.statistics import Statistics
from mergekit_lfm.plan.pieces import Piece
from mergekit_lfm.recipe.parts import Part
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.views.selected import Selected

TensorRef = tuple[int, str]  # (index of a model, then of a statistics file, then of the edits; name of a tensor there)


@dataclass(frozen=True, slots=True)
class PartRoles:
    """The models of a part of a recipe and their roles: `inputs`, `base` and `template` are indices into `models`.

    models: as the part sees them. origins: the index of each among the sources of the plan. base: the model that the
    method subtracts, None if the base is an input like the others. statistics: the inputs', () for methods without
    statistics, and their first index among the sources. added: the edits' changes to the result, float64 by tensor, and
    their index; None without edits, or if they are still to be made.
    """

    recipe: Recipe
    part: Part
    models: tuple[Checkpoint, ...]
    labels: tuple[str, ...]
    origins: tuple[int, ...]
    inputs: tuple[int, ...]
    base: int | None
    template: int
    statistics: tuple[Statistics, ...] = ()
    first_statistics: int = 0
    added: tuple[int, Checkpoint] | None = None

    @property
    def norms(self) -> tuple[float, ...]:
        """The norms of the inputs' statistics, for kinds that have one."""
        return tuple(statistics.info.norm for statistics in self.statistics if statistics.info.norm is not None)

    def refer(self, i: int, name: str) -> TensorRef:
        """The tensor of the plan's sources that is one of a model's."""
        model = self.models[i]
        return self.origins[i], model.source(name)[1] if isinstance(model, Selected) else name


def assign_roles(
    recipe: Recipe,
    piece: Piece,
    statistics: tuple[Statistics, ...] = (),
    first_statistics: int = 0,
    added: tuple[int, Checkpoint] | None = None,
) -> PartRoles:
    """The roles of the models of a part. added: as of `PartRoles`."""
    part, index = piece.part, {model: i for i, model in enumerate(piece.part.models)}
    origins = {model: i for i, model in enumerate(recipe.all_models)}
    inputs = tuple(index[model] for model in part.inputs)
    base = None if part.base is None or part.method.base in ("member", "first") else index[part.base]
    template = index.get(recipe.template, index[part.base] if part.base else inputs[0])
    return PartRoles(
        recipe,
        part,
        piece.models,
        tuple(model.label for model in part.models),
        tuple(origins[model] for model in part.models),
        inputs,
        base,
        template,
        statistics,
        first_statistics,
        added,
    )
