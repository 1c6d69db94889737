"""Recipes of `job: eval`: models judged on data. Checked completely before any work, without torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationInfo, model_validator

from mergekit_lfm.recipe.files import FoundModel, Where, find_reference, read_file
from mergekit_lfm.recipe.form import Reference, read_reference
from mergekit_lfm.recipe.job_form import A_DATA_FILE, JobForm, read_task
from mergekit_lfm.recipe.problems import Problem, attempt, problem_at, refuse
from mergekit_lfm.recipe.values import FOUND
from mergekit_lfm.runtime.tasks import TUNE_TASKS

JOB = "eval"
ROUTED = "routed"  # names the row of experts together


def _as_list(value: object) -> object:
    """One entry, or several."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


class EvalRecipe(JobForm):
    """A judgement as the user wrote it. models: each on all of the data, files of the task. stride: for "lm".

    experts: models that are judged together besides, each text by the one whose own texts, in its file, are most like
    it.

    Build one with `EvalRecipe.parse`. Paths are as of a merge's `Recipe`.
    """

    EXPECTED: ClassVar[str] = "a mapping with models, data and task"

    job: Literal["eval"]
    models: Annotated[tuple[Reference, ...], BeforeValidator(_as_list), Field(min_length=1)]
    data: Annotated[
        tuple[Annotated[str, BeforeValidator(read_reference)], ...], BeforeValidator(_as_list), Field(min_length=1)
    ]
    task: str
    experts: dict[str, Annotated[str, BeforeValidator(read_reference)]] = Field(default_factory=dict)
    window: int | None = Field(default=None, strict=True, ge=1)
    stride: int | None = Field(default=None, strict=True, ge=1)
    output: Annotated[str | None, BeforeValidator(read_reference)] = None

    _models: tuple[FoundModel, ...] = PrivateAttr()
    _data: tuple[Path, ...] = PrivateAttr()
    _experts: tuple[tuple[FoundModel, Path], ...] = PrivateAttr(default=())

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        where: Where = (info.context or {"where": Where()})["where"]
        models, files, problems = list[FoundModel](), list[Path](), read_task(self.task, TUNE_TASKS)
        for i, model in enumerate(self.models):
            found, missing = attempt(partial(find_reference, model, where), f"models[{i}]")
            problems += missing
            models += [] if found is None else [found]
        for i, name in enumerate(self.data):
            file, missing = read_file(name, where, f"data[{i}]", A_DATA_FILE)
            problems += missing
            files += [] if file is None else [file.path]
        for place, entries in (("models", self.models), ("data", self.data)):
            twice = sorted({entry for entry in entries if entries.count(entry) > 1})
            problems += [problem_at(place, FOUND, found=f"{entry} twice", expected="each once") for entry in twice]
        problems += self._read_experts(where)
        if self.stride is not None and self.task != "lm":
            problems.append(problem_at("stride", FOUND, found=str(self.stride), expected="none: it is for lm"))
        refuse(problems)
        self._models, self._data = tuple(models), tuple(files)
        return self

    def _read_experts(self, where: Where) -> list[Problem]:
        """Read the experts; the problems."""
        pairs, problems = list[tuple[FoundModel, Path]](), list[Problem]()
        for model, name in self.experts.items():
            place = f"experts.{model}"
            found, missing = attempt(partial(find_reference, model, where), place)
            file, absent = read_file(name, where, place, "a .jsonl or .txt file of its kind of texts")
            problems += [*missing, *absent]
            pairs += [] if found is None or file is None else [(found, file.path)]
        if len(self.experts) == 1 or (self.experts and self.task not in ("lm", "classification")):
            found_here = f"{len(self.experts)} for {self.task}"
            expected = "two or more to choose from, for lm or classification"
            problems.append(problem_at("experts", FOUND, found=found_here, expected=expected))
        if self.experts and ROUTED in self.models:
            problems.append(problem_at("models", FOUND, found=ROUTED, expected="another name, as it is the experts'"))
        self._experts = tuple(pairs)
        return problems

    @property
    def expert_models(self) -> tuple[tuple[FoundModel, Path], ...]:
        """The experts that are judged together, each with the file of its texts."""
        return self._experts

    @property
    def found(self) -> tuple[FoundModel, ...]:
        """The models that are judged."""
        return self._models

    @property
    def files(self) -> tuple[Path, ...]:
        """The data."""
        return self._data

    def normalised(self) -> dict[str, Any]:
        """The recipe in one canonical JSON-able form, which parses back to the same judgement on any machine."""
        optional = {key: getattr(self, key) for key in ("window", "stride") if getattr(self, key) is not None}
        optional |= {"experts": dict(self.experts)} if self.experts else {}
        return {"job": JOB, "models": list(self.models), "data": list(self.data), "task": self.task, **optional}
