"""Recipes of `job: meta` with `teachers` in place of data: an initialisation from models alone. Without torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationInfo, model_validator

from mergekit_lfm.errors import PlanError, did_you_mean
from mergekit_lfm.recipe.files import FoundModel, Where, find_reference
from mergekit_lfm.recipe.form import Reference, read_reference
from mergekit_lfm.recipe.job_form import JobForm
from mergekit_lfm.recipe.problems import Problem, attempt, problem_at, refuse
from mergekit_lfm.recipe.training import Group, Options
from mergekit_lfm.recipe.values import FOUND
from mergekit_lfm.recipe.without_data import EPISODES, FORM, TRAINED, WITHOUT_DATA, WithoutData

IMAGES_OF_STATE = "meta.*"  # a pattern for the names of what is trained beside the model
INNER_STEPS, INNER_RATE = 5, 0.1
OWN = (*TRAINED, *EPISODES, *FORM, "radius", "curriculum", "directions")
Number = Annotated[int, Field(strict=True, ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Pixel = Annotated[float, Field(allow_inf_nan=False)]


def _as_models(value: object) -> object:
    """One model or several."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


class TeachersRecipe(JobForm):
    """A meta-learning without data as the user wrote it. model: the architecture, and the weights to begin with.

    teachers: models of other tasks each. algorithm: one of `WITHOUT_DATA`. steps, learning_rate: of the training;
    batch_size: episodes of a step. shots, queries: images of each class to adapt on, and to judge by; inner_steps,
    inner_rate: of adapting. images: of each class of a teacher, by default twice the larger of shots and queries;
    image_steps: before the others, in which images alone change; image_rate: by which they do. size, low, high: as of
    `synthesise`. radius: of dro's ball, where embeddings have length 1. curriculum: the weight of purer's harder
    episodes, 0 for none. directions: along which bidf asks.
    """

    EXPECTED: ClassVar[str] = "a mapping with model, teachers and algorithm"

    job: Literal["meta"]
    model: Reference
    teachers: Annotated[tuple[Reference, ...], BeforeValidator(_as_models)]
    algorithm: str = "average"
    steps: Number = 200
    batch_size: Number = 4
    learning_rate: Rate | None = None
    shots: Number = 5
    queries: Number = 15
    inner_steps: Number = INNER_STEPS
    inner_rate: Rate = INNER_RATE
    images: Number | None = None
    image_steps: Annotated[int, Field(strict=True, ge=0)] = 50
    image_rate: Rate = 0.1
    size: Number | None = None
    low: Pixel | None = None
    high: Pixel | None = None
    radius: Share = 0.5
    curriculum: Share = 1.0
    directions: Number = 20
    seed: int = Field(default=0, strict=True, ge=0, lt=2**63)
    output: Annotated[str | None, BeforeValidator(read_reference)] = None

    _model: FoundModel = PrivateAttr()
    _teachers: tuple[FoundModel, ...] = PrivateAttr(default=())

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        where: Where = (info.context or {"where": Where()})["where"]
        found, problems = list[FoundModel](), list[Problem]()
        for place, text in (("model", self.model), *((f"teachers[{i}]", x) for i, x in enumerate(self.teachers))):
            model, missing = attempt(partial(find_reference, text, where), place)
            problems += missing
            found += [] if model is None else [model]
        if len(self.teachers) < 2:
            expected = "two or more, each of a task of its own"
            problems.append(problem_at("teachers", FOUND, found=f"{len(self.teachers)}", expected=expected))
        for text in sorted({x for x in self.teachers if self.teachers.count(x) > 1}):
            problems.append(problem_at("teachers", FOUND, found=f"{text} twice", expected="each once"))
        refuse([*problems, *self._check_settings()])
        self._model, *teachers = found
        self._teachers = tuple(teachers)
        return self

    def _check_settings(self) -> Iterator[Problem]:
        """The problems of the algorithm, and of the keys that it does not read."""
        row = WITHOUT_DATA.get(self.algorithm)
        if row is None:
            cure = did_you_mean(self.algorithm, WITHOUT_DATA)
            expected = f"{', '.join(WITHOUT_DATA)}, which need no data"
            yield problem_at("algorithm", FOUND + "; {cure}", found=repr(self.algorithm), expected=expected, cure=cure)
            return
        for key in OWN:
            is_set = key in self.model_fields_set and getattr(self, key) is not None
            if is_set and key not in row.reads:
                yield problem_at(key, FOUND, found="it", expected=f"none: {row.name} does not read {key}; leave it out")
        need = self.shots + self.queries
        if self.images is not None and self.images < need:
            expected = f"at least {need}, for {self.shots} shots and {self.queries} queries"
            yield problem_at("images", FOUND, found=str(self.images), expected=expected)
        both = 2 * max(self.shots, self.queries)
        if row.name == "bidf" and need <= (self.images or both) < both:
            expected = f"at least {both} for bidf, one half for shots and one for queries"
            yield problem_at("images", FOUND, found=str(self.images), expected=expected)
        if self.low is not None and self.high is not None and not self.low < self.high:
            yield problem_at("high", FOUND, found=f"{self.high:g}", expected=f"a number above low, {self.low:g}")
        try:
            _ = self.options
        except PlanError as error:
            yield Problem("", str(error))

    @property
    def row(self) -> WithoutData:
        """The algorithm."""
        return WITHOUT_DATA[self.algorithm]

    @property
    def found(self) -> FoundModel:
        """The model that is learned from."""
        return self._model

    @property
    def found_teachers(self) -> tuple[FoundModel, ...]:
        """The teachers."""
        return self._teachers

    @property
    def count(self) -> int:
        """The images of each class of a teacher."""
        return self.images or 2 * max(self.shots, self.queries)

    @property
    def options(self) -> Options:
        """The settings of the training."""
        beside = "image_rate" in self.row.reads
        return Options(
            steps=self.steps + (self.image_steps if beside else 0),
            batch_size=self.batch_size if beside else 1,
            learning_rate=self.learning_rate or self.row.rate,
            schedule="cosine",
            clip=0.0,
            seed=self.seed,
            groups=(Group(IMAGES_OF_STATE, learning_rate=self.image_rate),) if beside else (),
        )

    def normalised(self) -> dict[str, Any]:
        """The recipe in one canonical JSON-able form, which parses back to the same result on any machine."""
        whole: dict[str, Any] = {"job": self.job, "model": self.model, "teachers": [*self.teachers]}
        read = {key: x for key in OWN if key in self.row.reads and (x := getattr(self, key)) is not None}
        read |= {"seed": self.seed} if self.row.reads else {}
        read |= {"learning_rate": self.options.learning_rate} if "learning_rate" in self.row.reads else {}
        return {**whole, "algorithm": self.algorithm, **read}
