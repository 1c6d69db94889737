"""Recipes of `job: head`: a saved model gets a new head for labels. Checked completely before any work."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationInfo, model_validator

from mergekit_lfm.errors import Refusal
from mergekit_lfm.recipe.files import FoundModel, Where, find_reference
from mergekit_lfm.recipe.form import Reference, read_reference
from mergekit_lfm.recipe.job_form import JobForm
from mergekit_lfm.recipe.problems import attempt, refuse

JOB = "head"


def _as_names(value: object) -> object:
    """The labels' names; a number stands for so many, LABEL_0 and so on, as transformers has it; 1 is for numbers."""
    expected = "a number from 1, or a list of names, each once"
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return tuple(f"LABEL_{i}" for i in range(value))
    names = list(value) if isinstance(value, list | tuple) else []
    texts = [name for name in names if isinstance(name, str) and name.strip()]
    if len({*texts}) < max(1, len(names)):
        raise Refusal("found {found}, expected {expected}", found=repr(value), expected=expected)
    return tuple(names)


class HeadRecipe(JobForm):
    """A new head as the user wrote it. labels: their names, or their number. seed: of its random weights.

    Build one with `HeadRecipe.parse`. Paths are as of a merge's `Recipe`.
    """

    EXPECTED: ClassVar[str] = "a mapping with model and labels"

    job: Literal["head"]
    model: Reference
    labels: Annotated[tuple[str, ...], BeforeValidator(_as_names)]
    seed: int = Field(default=0, strict=True, ge=0, lt=2**63)
    output: Annotated[str | None, BeforeValidator(read_reference)] = None

    _model: FoundModel = PrivateAttr()

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        where: Where = (info.context or {"where": Where()})["where"]
        model, problems = attempt(partial(find_reference, self.model, where), "model")
        refuse(problems)
        assert model is not None
        self._model = model
        return self

    @property
    def found(self) -> FoundModel:
        """The model that gets the head."""
        return self._model

    def normalised(self) -> dict[str, Any]:
        """The recipe in one canonical JSON-able form, which parses back to the same head on any machine."""
        return {"job": JOB, "model": self.model, "labels": list(self.labels), "seed": self.seed}
