"""Recipes of `job: stats`: statistics of a model on data. Checked completely before any work, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationInfo, model_validator

from mergekit_lfm.errors import PlanError
from mergekit_lfm.methods.kinds import StatisticMethod
from mergekit_lfm.methods.method import Value
from mergekit_lfm.recipe.files import FoundModel, Where, find_reference, read_file
from mergekit_lfm.recipe.form import Parameters, Reference, read_reference
from mergekit_lfm.recipe.job_form import A_DATA_FILE, JobForm, read_task
from mergekit_lfm.recipe.options import defaults_of, read_options, readers_of, unknown_method
from mergekit_lfm.recipe.problems import Problem, attempt, problem_at, refuse
from mergekit_lfm.recipe.registry import STATISTIC_METHODS
from mergekit_lfm.recipe.values import FOUND
from mergekit_lfm.runtime.tasks import TASKS

JOB = "stats"
DTYPES = Literal["float32", "float64", "bfloat16", "float16"]


class StatsRecipe(JobForm):
    """Statistics as the user wrote them. kind: of one model, such as "gram"; parameters: of the kind.

    layers: only those with one of these texts in their names. max_examples: only the first ones. window: the most
    tokens of an example. dtype: that the model computes in.

    Build one with `StatsRecipe.parse`. Paths are as of a merge's `Recipe`.
    """

    EXPECTED: ClassVar[str] = "a mapping with kind, model, data and task"

    job: Literal["stats"]
    kind: str
    model: Reference
    data: Annotated[str, BeforeValidator(read_reference)]
    task: str
    parameters: Parameters = Field(default_factory=dict)
    layers: tuple[str, ...] = ()
    max_examples: int | None = Field(default=None, strict=True, ge=1)
    window: int | None = Field(default=None, strict=True, ge=1)
    batch_size: int = Field(default=16, strict=True, ge=1)
    dtype: DTYPES = "float32"
    output: Annotated[str | None, BeforeValidator(read_reference)] = None

    _model: FoundModel = PrivateAttr()
    _data: Path = PrivateAttr()
    _settings: Mapping[str, Value] = PrivateAttr()

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        where: Where = (info.context or {"where": Where()})["where"]
        model, problems = attempt(partial(find_reference, self.model, where), "model")
        data, missing = read_file(self.data, where, "data", A_DATA_FILE)
        problems += [*missing, *read_task(self.task, TASKS)]
        kinds = {name: each for name, each in STATISTIC_METHODS.items() if each.outline is not None}
        if self.kind in kinds:
            problems += self._read_settings(kinds[self.kind])
        elif self.kind in STATISTIC_METHODS:
            expected = f"a statistic of one model: {' or '.join(kinds)}"
            problems.append(problem_at("kind", FOUND, found=repr(self.kind), expected=expected))
        else:
            problems.append(unknown_method(self.kind, kinds, JOB)._replace(place="kind"))
        refuse(problems)
        assert model is not None and data is not None
        self._model, self._data = model, data.path
        return self

    def _read_settings(self, method: StatisticMethod[Any]) -> list[Problem]:
        """Read the parameters of the kind; the problems."""
        values, problems = read_options(self.parameters, readers_of(method.parameters), method.name, "parameters")
        try:
            self._settings = method.settle(self.task, {**defaults_of(method.parameters), **values})
        except PlanError as error:
            problems.append(problem_at("task", FOUND, found=self.task, expected=str(error)))
        return problems

    @property
    def found(self) -> FoundModel:
        """The model that is measured."""
        return self._model

    @property
    def data_file(self) -> Path:
        """The data."""
        return self._data

    @property
    def settings(self) -> Mapping[str, Value]:
        """The parameters with an effect."""
        return self._settings

    @property
    def method(self) -> StatisticMethod[Any]:
        """The kind."""
        return STATISTIC_METHODS[self.kind]

    def normalised(self) -> dict[str, Any]:
        """The recipe in one canonical JSON-able form, which parses back to the same statistics on any machine."""
        optional = {key: getattr(self, key) for key in ("max_examples", "window") if getattr(self, key) is not None}
        own = {name: getattr(self, name) for name in ("kind", "model", "data", "task", "batch_size", "dtype")}
        return {"job": JOB, **own, "parameters": dict(self.settings), "layers": sorted(self.layers), **optional}
