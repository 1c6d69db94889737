"""Recipes of `job: student`: a smaller model from a saved one, or a new one. Checked completely before any work."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationInfo, model_validator

from mergekit_lfm.recipe.files import FoundModel, Where, find_reference, read_file
from mergekit_lfm.recipe.form import Reference, read_reference
from mergekit_lfm.recipe.job_form import JobForm
from mergekit_lfm.recipe.problems import Problem, attempt, problem_at, refuse
from mergekit_lfm.recipe.values import FOUND, NamedFile

JOB = "student"
Share = Annotated[float, Field(gt=0, le=1)]
Number = Annotated[int, Field(strict=True, ge=0)]
OWN = ("layers", "keep", "mlp", "stats", "random", "seed")  # in the order in which a user reads them


class StudentRecipe(JobForm):
    """A student as the user wrote it. layers: those of the model, in order, each as often as it is named.

    keep: a share of the layers in place of their numbers. mlp: the share of the hidden units of each MLP that stays.
    stats: Gram matrices of the model, for the importance of units. random: new weights in place of the model's, from
    `seed`.

    Build one with `StudentRecipe.parse`. Paths are as of a merge's `Recipe`.
    """

    EXPECTED: ClassVar[str] = "a mapping with model, and layers, keep, mlp or random"

    job: Literal["student"]
    model: Reference
    layers: Annotated[tuple[Number, ...], Field(min_length=1)] | None = None
    keep: Share | None = None
    mlp: Share | None = None
    stats: Annotated[str | None, BeforeValidator(read_reference)] = None
    random: bool = Field(default=False, strict=True)
    seed: int | None = Field(default=None, strict=True, ge=0, lt=2**63)
    output: Annotated[str | None, BeforeValidator(read_reference)] = None

    _model: FoundModel = PrivateAttr()
    _stats: NamedFile | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        context = info.context or {"where": Where(), "whole": True}
        where: Where = context["where"]
        model, problems = attempt(partial(find_reference, self.model, where), "model")
        problems += self._idle_keys() if context["whole"] else ()
        if self.stats is not None:
            self._stats, missing = read_file(self.stats, where, "stats", "a file of `mergekit-lfm stats gram`")
            problems += missing
        if model is not None and model.adapters and self.random:
            expected = "a model without adapters: random weights take none"
            problems.append(problem_at("model", FOUND, found=self.model, expected=expected))
        refuse(problems)
        assert model is not None
        self._model = model
        return self

    def _idle_keys(self) -> Iterator[Problem]:
        """The keys that have no effect beside the others."""
        if self.layers is None and self.keep is None and self.mlp is None and not self.random:
            yield Problem("", "nothing makes the model smaller or new: give layers, keep, mlp or random")
        if self.layers is not None and self.keep is not None:
            yield Problem("keep", "found beside `layers`, expected one of the two")
        if self.stats is not None and (self.mlp is None or self.random):
            yield Problem("stats", "found without `mlp`, or beside `random`; they rank units that stay as they are")
        if self.seed is not None and not self.random:
            yield Problem("seed", "found without `random`; nothing else is drawn")

    @property
    def found(self) -> FoundModel:
        """The model that the student is made from."""
        return self._model

    @property
    def statistics(self) -> NamedFile | None:
        """The file of Gram matrices."""
        return self._stats

    def normalised(self) -> dict[str, Any]:
        """The recipe in one canonical JSON-able form, which parses back to the same student on any machine."""
        own = {name: value for name in OWN if (value := getattr(self, name)) not in (None, False)}
        if self.layers is not None:
            own["layers"] = list(self.layers)
        if self.random:
            own["seed"] = self.seed or 0
        return {"job": JOB, "model": self.model, **own}
