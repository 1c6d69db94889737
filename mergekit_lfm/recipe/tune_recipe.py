"""Recipes of `job: tune`: a model trained on data by a method. Checked completely before any work, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationInfo, model_validator

from mergekit_lfm.errors import PlanError, Refusal, did_you_mean
from mergekit_lfm.methods.kinds import TuneMethod
from mergekit_lfm.methods.method import Value
from mergekit_lfm.recipe.files import FoundModel, Where, find_reference, read_file
from mergekit_lfm.recipe.form import Parameters, Reference, Strict, read_reference
from mergekit_lfm.recipe.job_form import JobForm
from mergekit_lfm.recipe.loss_terms import check_terms
from mergekit_lfm.recipe.options import defaults_of, read_options, readers_of, unknown_method
from mergekit_lfm.recipe.problems import Problem, attempt, problem_at, refuse
from mergekit_lfm.recipe.registry import TUNE_METHODS
from mergekit_lfm.recipe.training import Group, Options, Schedule
from mergekit_lfm.recipe.values import FOUND
from mergekit_lfm.runtime.calls import is_function
from mergekit_lfm.runtime.tasks import TASKS, TUNE_TASKS

JOB = "tune"
A_FILE = "a .jsonl, .txt or .npz file, a folder of images, or package.module:function"


def tune_options(method: str, given: Mapping[str, Any]) -> dict[str, Value]:
    """A value for each parameter of a tuning method, of those given or the default. Raises PlanError for wrong ones."""
    values, problems = _read_parameters(TUNE_METHODS[method], given)
    refuse(problems)
    return values


def _read_parameters(method: TuneMethod[Any], given: Mapping[str, Any]) -> tuple[dict[str, Value], list[Problem]]:
    values, problems = read_options(given, readers_of(method.parameters), method.name, "parameters")
    own = {parameter.name for parameter in method.parameters}
    for name in given.keys() - own:
        owners = [each.name for each in TUNE_METHODS.values() if name in {p.name for p in each.parameters}]
        if owners:
            problems = [each for each in problems if each.place != f"parameters.{name}"]
            sentence = "{method} has no such parameter; {owners} have it"
            problems.append(problem_at(f"parameters.{name}", sentence, method=method.name, owners=", ".join(owners)))
    return {**defaults_of(method.parameters), **values}, problems


class DataEntry(Strict):
    """A file of examples. most: how many of them, drawn anew each time round, are used in one; all by default."""

    path: Annotated[str, BeforeValidator(read_reference)]
    most: int | None = Field(default=None, strict=True, ge=1)


def _as_entries(value: object) -> object:
    """One file or several, each a path or {path, most}."""
    entries = list(value) if isinstance(value, list | tuple) else [value]
    return tuple(each if isinstance(each, Mapping | DataEntry) else {"path": each} for each in entries)


Entries = Annotated[tuple[DataEntry, ...], BeforeValidator(_as_entries), Field(min_length=1)]


class GroupEntry(Strict):
    """Parameters whose names match a pattern, with a learning rate or a weight decay of their own."""

    match: str
    learning_rate: float | None = None
    weight_decay: float | None = None


def _read_dev(value: object) -> object:
    """A share of the data, or a file."""
    if isinstance(value, float) and 0 < value < 1:
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        expected = "a share of the data above 0 and below 1, or a file"
        raise Refusal("found {found}, expected {expected}", found=str(value), expected=expected)
    return read_reference(value)


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of examples as named, where it is, and how many of them are used in one time round; None for all.

    is_function: `ref` names a function that returns the examples, and `path` is nothing.
    """

    ref: str
    path: Path
    most: int | None = None
    is_function: bool = False


class TuneRecipe(JobForm):
    """A tuning as the user wrote it. parameters: of the method; the other settings are of every training.

    loss: numbers of the terms that are added to the task's loss, as `LOSS_TERMS` has them.
    stats: a file of Fisher information, for the method that needs one. window: the most tokens of an example.
    dev: a file, or a share of the data. learning_rate: by default the method's. The rest is explained at `Options`.

    Build one with `TuneRecipe.parse`. Paths are as of a merge's `Recipe`.
    """

    EXPECTED: ClassVar[str] = "a mapping with model, data and task"

    job: Literal["tune"]
    model: Reference
    data: Entries
    task: str
    method: str = "full"
    parameters: Parameters = Field(default_factory=dict)
    loss: dict[str, float] = Field(default_factory=dict)
    dev: Annotated[str | float | None, BeforeValidator(_read_dev)] = None
    groups: tuple[GroupEntry, ...] = ()
    stats: Annotated[str | None, BeforeValidator(read_reference)] = None
    window: int | None = Field(default=None, strict=True, ge=1)
    steps: int = Field(default=200, strict=True)
    batch_size: int = Field(default=16, strict=True)
    learning_rate: float | None = None
    schedule: Schedule = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = Field(default=1, strict=True)
    evaluate_every: int | None = Field(default=None, strict=True)
    patience: int | None = Field(default=None, strict=True)
    checkpointing: bool = Field(default=False, strict=True)
    autocast: bool = Field(default=False, strict=True)
    seed: int = Field(default=0, strict=True, ge=0, lt=2**63)
    output: Annotated[str | None, BeforeValidator(read_reference)] = None

    _model: FoundModel = PrivateAttr()
    _data: tuple[DataFile, ...] = PrivateAttr()
    _dev: DataFile | None = PrivateAttr(default=None)
    _stats: Path | None = PrivateAttr(default=None)
    _options: Options = PrivateAttr()
    _settings: dict[str, Value] = PrivateAttr()

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        where: Where = (info.context or {"where": Where()})["where"]
        model, problems = attempt(partial(find_reference, self.model, where), "model")
        files = list[DataFile]()
        named = [(f"data[{i}].path", entry) for i, entry in enumerate(self.data)]
        named += [("dev", DataEntry(path=self.dev))] if isinstance(self.dev, str) else []
        for place, entry in named:
            if is_function(entry.path):
                files.append(DataFile(entry.path, Path(), entry.most, is_function=True))
                continue
            found, missing = read_file(entry.path, where.folder, place, A_FILE)
            problems += missing
            if found is not None:
                files.append(DataFile(entry.path, found.path, entry.most))
        if self.task not in TUNE_TASKS:
            cure = did_you_mean(self.task, TUNE_TASKS)
            expected = ", ".join(TUNE_TASKS)
            problems.append(problem_at("task", FOUND + "; {cure}", found=repr(self.task), expected=expected, cure=cure))
        method = TUNE_METHODS.get(self.method)
        if method is None:
            problems.append(unknown_method(self.method, TUNE_METHODS, "tune"))
        else:
            problems += self._read_settings(method, where)
        refuse(problems)
        assert model is not None
        self._model = model
        self._data, self._dev = tuple(files[: len(self.data)]), files[-1] if isinstance(self.dev, str) else None
        return self

    def _read_settings(self, method: TuneMethod[Any], where: Where) -> list[Problem]:
        """Read what depends on the method; the problems."""
        self._settings, problems = _read_parameters(method, self.parameters)
        if method.needs is not None and self.task in TUNE_TASKS and self.task not in TASKS:
            expected = f"one of {', '.join(TASKS)}, for which there are statistics; or another method"
            problems.append(problem_at("task", FOUND, found=repr(self.task), expected=expected))
        elif (method.needs is None) != (self.stats is None):
            needs = f"the file of `mergekit-lfm stats {method.needs}`" if method.needs else "no file: leave it out"
            problems.append(problem_at("stats", FOUND, found=repr(self.stats), expected=needs))
        elif self.stats is not None:
            found, missing = read_file(self.stats, where.folder, "stats", "a statistics file")
            self._stats, problems = None if found is None else found.path, [*problems, *missing]
        problems += check_terms(self.loss, self.task, method.makes)
        if self.evaluate_every is not None and self.dev is None:
            problems.append(
                problem_at("evaluate_every", FOUND, found=str(self.evaluate_every), expected="`dev` beside it")
            )
        if self.task == "embedding" and self.batch_size < 2:
            expected = "2 or more for embedding, whose loss compares the texts of a batch"
            problems.append(problem_at("batch_size", FOUND, found=str(self.batch_size), expected=expected))
        if self.task == "embedding" and self.accumulate > 1:
            expected = "1 for embedding, whose loss is about all texts of a batch at once"
            problems.append(problem_at("accumulate", FOUND, found=str(self.accumulate), expected=expected))
        if self.patience is not None and (self.dev is None or self.evaluate_every is None):
            expected = "`dev` and `evaluate_every` beside it"
            problems.append(problem_at("patience", FOUND, found=str(self.patience), expected=expected))
        try:
            self._options = self._make_options(method)
        except PlanError as error:
            problems.append(Problem("", str(error)))
        return problems

    def _make_options(self, method: TuneMethod[Any]) -> Options:
        names = Options.__dataclass_fields__.keys() - {"learning_rate", "groups"}
        rate = method.rate if self.learning_rate is None else self.learning_rate
        groups = tuple(Group(**dict(entry)) for entry in self.groups)
        return Options(learning_rate=rate, groups=groups, **{name: getattr(self, name) for name in names})

    @property
    def found(self) -> FoundModel:
        """The model that is tuned."""
        return self._model

    @property
    def files(self) -> tuple[DataFile, ...]:
        """The files of examples."""
        return self._data

    @property
    def dev_file(self) -> DataFile | None:
        """The file of the development set."""
        return self._dev

    @property
    def dev_share(self) -> float | None:
        """The share of the data that is the development set."""
        return self.dev if isinstance(self.dev, float) else None

    @property
    def statistics(self) -> Path | None:
        """The file of Fisher information."""
        return self._stats

    @property
    def options(self) -> Options:
        """The settings of the training."""
        return self._options

    @property
    def settings(self) -> Mapping[str, Value]:
        """A value for each parameter of the method."""
        return self._settings

    @property
    def declaration(self) -> TuneMethod[Any]:
        """The method."""
        return TUNE_METHODS[self.method]

    def normalised(self) -> dict[str, Any]:
        """The recipe in one canonical JSON-able form, which parses back to the same tuning on any machine."""
        data = [{"path": e.path} | ({} if e.most is None else {"most": e.most}) for e in self.data]
        options = asdict(self._options)
        groups = [{k: v for k, v in group.items() if v is not None} for group in options.pop("groups")]
        optional = {key: getattr(self, key) for key in ("dev", "stats", "window") if getattr(self, key) is not None}
        return {
            "job": JOB,
            "model": self.model,
            "data": data,
            "task": self.task,
            "method": self.method,
            "parameters": dict(self._settings),
            **optional,
            **({"loss": dict(sorted(self.loss.items()))} if self.loss else {}),
            **{name: value for name, value in options.items() if value is not None},
            **({"groups": groups} if groups else {}),
        }
