"""Recipes of `job: extract`: the change from one model to another as an adapter. Checked completely before any work."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationInfo, model_validator

from mergekit_lfm.errors import PlanError, did_you_mean
from mergekit_lfm.machine.sizes import parse_size
from mergekit_lfm.recipe.files import FoundModel, Where, find_reference
from mergekit_lfm.recipe.form import Dtype, Reference, read_reference
from mergekit_lfm.recipe.job_form import JobForm
from mergekit_lfm.recipe.problems import Problem, attempt, problem_at, refuse
from mergekit_lfm.recipe.values import FOUND

JOB = "extract"
DTYPES = ("float32", "bfloat16", "float16")
RANK = 32  # where nothing says how many
CHOICES = ("rank", "energy", "size")
EXPRESSIONS = ("include", "exclude", "save")


def _as_list(value: object) -> object:
    return () if value is None else [value] if isinstance(value, str) else value


Expressions = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
Size = Annotated[
    int | None,
    Field(strict=True, ge=1),
    BeforeValidator(lambda value: parse_size(value) if isinstance(value, str) else value),
]


class ExtractRecipe(JobForm):
    """An extraction of an adapter as the user wrote it: the change from `base_model` to `model`.

    One of: rank, of all matrices (32 without any of the three); energy, the share of the squares of each matrix's
    change to keep; size, bytes for the adapter. include, exclude: regular expressions; only tensors with one of the
    first in their names and none of the second. save: those of modules to save whole. embed_lora: embeddings and heads
    as products, too. exact: decompose without random numbers. dtype: of the products.

    Build one with `ExtractRecipe.parse`. Paths are as of a merge's `Recipe`.
    """

    EXPECTED: ClassVar[str] = "a mapping with model and base_model"

    job: Literal["extract"]
    model: Reference
    base_model: Reference
    rank: int | None = Field(default=None, strict=True, ge=1)
    energy: float | None = Field(default=None, strict=True, gt=0, le=1)
    size: Size = None
    include: Expressions = ()
    exclude: Expressions = ()
    save: Expressions = ()
    embed_lora: bool = Field(default=False, strict=True)
    exact: bool = Field(default=False, strict=True)
    dtype: Dtype = "float32"
    output: Annotated[str | None, BeforeValidator(read_reference)] = None

    _models: tuple[FoundModel, FoundModel] = PrivateAttr()

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        where: Where = (info.context or {"where": Where()})["where"]
        models, problems = list[FoundModel | None](), list[Problem]()
        for key in ("model", "base_model"):
            found, missing = attempt(partial(find_reference, getattr(self, key), where), key)
            models.append(found)
            problems += missing
        stated = [f"`{key}`" for key in CHOICES if getattr(self, key) is not None]
        if len(stated) > 1:
            expected = "one of rank, energy and size; leave out the others"
            problems.append(problem_at(stated[0].strip("`"), FOUND, found=" and ".join(stated), expected=expected))
        for key in EXPRESSIONS:
            for i, text in enumerate(getattr(self, key)):
                problems += attempt(partial(_compile, text), f"{key}[{i}]")[1]
        if self.dtype not in (None, *DTYPES):
            words = {"found": repr(self.dtype), "expected": f"one of {', '.join(DTYPES)}"}
            problems.append(problem_at("dtype", FOUND + "; {cure}", **words, cure=did_you_mean(self.dtype, DTYPES)))
        refuse(problems)
        model, base = models
        assert model is not None and base is not None
        self._models = model, base
        return self

    @property
    def models(self) -> tuple[FoundModel, FoundModel]:
        """The model and its base."""
        return self._models

    def normalised(self) -> dict[str, Any]:
        """The recipe in one canonical JSON-able form, which parses back to the same adapter on any machine."""
        stated = {key: getattr(self, key) for key in CHOICES if getattr(self, key) is not None}
        return {
            "job": JOB,
            "model": self.model,
            "base_model": self.base_model,
            **(stated or {"rank": RANK}),
            **{key: list(getattr(self, key)) for key in EXPRESSIONS if getattr(self, key)},
            **{key: True for key in ("embed_lora", "exact") if getattr(self, key)},
            "dtype": self.dtype or "float32",
        }


def _compile(text: str) -> re.Pattern[str]:
    """The regular expression. Raises PlanError for a wrong one."""
    try:
        return re.compile(text)
    except re.error as error:
        words = {"found": repr(text), "expected": f"a regular expression ({error})"}
        raise PlanError(FOUND + "; {cure}", **words, cure="correct it") from None
