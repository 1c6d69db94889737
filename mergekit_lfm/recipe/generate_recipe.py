"""Recipes of `job: generate`: texts that a language model writes. Checked completely before any work, without torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationInfo, model_validator

from mergekit_lfm.recipe.files import FoundModel, Where, find_reference, read_file
from mergekit_lfm.recipe.form import Reference, read_reference
from mergekit_lfm.recipe.job_form import JobForm, read_task
from mergekit_lfm.recipe.problems import Problem, attempt, problem_at, refuse
from mergekit_lfm.recipe.stats_recipe import DTYPES
from mergekit_lfm.recipe.values import FOUND

JOB = "generate"
GENERATE_TASKS = ("lm", "seq2seq")
A_PROMPT_FILE = "a .jsonl file of prompts or messages"
MOST_TOKENS = 256  # of a text, by default


class GenerateRecipe(JobForm):
    """Texts as the user asks for them. data: a file of prompts; without one the model begins each text by itself.

    count: texts for each prompt, or in all without prompts. temperature: 0 takes the most likely token each time;
    top_k, top_p: as of `Sampling`. window: the most tokens of a prompt with its answer. dtype: that the model computes
    in.

    Build one with `GenerateRecipe.parse`. Paths are as of a merge's `Recipe`.
    """

    EXPECTED: ClassVar[str] = "a mapping with model, and data or count"

    job: Literal["generate"]
    model: Reference
    data: Annotated[str | None, BeforeValidator(read_reference)] = None
    task: str = "lm"
    count: int = Field(default=1, strict=True, ge=1)
    max_new_tokens: int = Field(default=MOST_TOKENS, strict=True, ge=1)
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    top_k: int | None = Field(default=None, strict=True, ge=1)
    top_p: float = Field(default=1.0, gt=0, le=1)
    window: int | None = Field(default=None, strict=True, ge=1)
    batch_size: int = Field(default=16, strict=True, ge=1)
    dtype: DTYPES = "float32"
    seed: int = Field(default=0, strict=True, ge=0, lt=2**63)
    output: Annotated[str | None, BeforeValidator(read_reference)] = None

    _model: FoundModel = PrivateAttr()
    _data: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        where: Where = (info.context or {"where": Where()})["where"]
        model, problems = attempt(partial(find_reference, self.model, where), "model")
        problems += read_task(self.task, GENERATE_TASKS)
        if self.data is not None:
            data, missing = read_file(self.data, where, "data", A_PROMPT_FILE)
            problems += missing
            self._data = None if data is None else data.path
        elif self.task == "seq2seq":
            expected = "prompts for the encoder: give data, or the task lm"
            problems.append(problem_at("task", FOUND, found="seq2seq without data", expected=expected))
        problems += self._check_greedy()
        refuse(problems)
        assert model is not None
        self._model = model
        return self

    def _check_greedy(self) -> list[Problem]:
        """The settings that say nothing where each token is the most likely one."""
        if self.temperature > 0:
            return []
        idle = {"top_k": self.top_k is not None, "top_p": self.top_p < 1, "count": self.count > 1}
        expected = "none at temperature 0, where all texts of a prompt are the same"
        return [problem_at(key, FOUND, found=str(getattr(self, key)), expected=expected) for key in idle if idle[key]]

    @property
    def found(self) -> FoundModel:
        """The model that writes."""
        return self._model

    @property
    def data_file(self) -> Path | None:
        """The file of prompts."""
        return self._data

    def normalised(self) -> dict[str, Any]:
        """The recipe in one canonical JSON-able form, which parses back to the same texts on any machine."""
        optional = {key: x for key in ("data", "top_k", "window") if (x := getattr(self, key)) is not None}
        own = ("model", "task", "count", "max_new_tokens", "temperature", "top_p", "batch_size", "dtype", "seed")
        return {"job": JOB, **{name: getattr(self, name) for name in own}, **optional}
