"""Recipes of trainings, and of `job: tune`: a model trained on data by a method. Checked beforehand, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationInfo, model_validator

from mergekit_lfm.errors import PlanError
from mergekit_lfm.methods.kinds import TuneMethod
from mergekit_lfm.methods.method import Value
from mergekit_lfm.recipe.files import FoundModel, Where, find_reference, read_file
from mergekit_lfm.recipe.form import Parameters, Reference, read_reference
from mergekit_lfm.recipe.job_form import JobForm, read_task
from mergekit_lfm.recipe.loss_terms import LOSS_TERMS, check_terms
from mergekit_lfm.recipe.options import unknown_method
from mergekit_lfm.recipe.phases import GroupEntry, Patterns, PhaseEntry
from mergekit_lfm.recipe.problems import Problem, attempt, problem_at, refuse
from mergekit_lfm.recipe.registry import TUNE_METHODS
from mergekit_lfm.recipe.training import Group, Optimizer, Options, Schedule
from mergekit_lfm.recipe.tune_data import DataEntry, DataFile, Dev, Entries, check_clusters, find_data, read_named
from mergekit_lfm.recipe.tune_options import read_parameters
from mergekit_lfm.recipe.values import FOUND
from mergekit_lfm.runtime.tasks import TASKS, TUNE_TASKS


class TrainingRecipe(JobForm):
    """A training as the user wrote it. parameters: of the method; the other settings are of every training.

    loss: numbers of the terms that are added to the task's loss, as `LOSS_TERMS` has them.
    stats: a file of Fisher information, for the method that needs one. window: the most tokens of an example.
    dev: a file, or a share of the data. learning_rate: by default the method's. train: patterns for the names of
    parameters; the method trains these alone. phases: several such parts one after the other, each with its steps.
    held_out: clusters of data that are not trained on, but judged. The rest is explained at `Options`.

    Build one by the `parse` of its job's class. Paths are as of a merge's `Recipe`.
    """

    EXPECTED: ClassVar[str] = "a mapping with model, data and task"
    VERB: ClassVar[str] = "tuning"

    job: str
    model: Reference
    data: Entries
    task: str
    method: str = "full"
    parameters: Parameters = Field(default_factory=dict)
    loss: dict[str, float] = Field(default_factory=dict)
    dev: Dev = None
    groups: tuple[GroupEntry, ...] = ()
    stats: Annotated[str | None, BeforeValidator(read_reference)] = None
    train: Patterns | None = None
    phases: tuple[PhaseEntry, ...] = ()
    held_out: tuple[str, ...] = ()
    window: int | None = Field(default=None, strict=True, ge=1)
    steps: int = Field(default=200, strict=True)
    batch_size: int = Field(default=16, strict=True)
    learning_rate: float | None = None
    schedule: Schedule = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None
    accumulate: int = Field(default=1, strict=True)
    evaluate_every: int | None = Field(default=None, strict=True)
    patience: int | None = Field(default=None, strict=True)
    checkpointing: bool = Field(default=False, strict=True)
    autocast: bool = Field(default=False, strict=True)
    optimizer: Optimizer | None = None
    seed: int = Field(default=0, strict=True, ge=0, lt=2**63)
    output: Annotated[str | None, BeforeValidator(read_reference)] = None

    _model: FoundModel = PrivateAttr()
    _data: tuple[DataFile, ...] = PrivateAttr()
    _dev: DataFile | None = PrivateAttr(default=None)
    _stats: Path | None = PrivateAttr(default=None)
    _named: tuple[DataFile, ...] = PrivateAttr(default=())
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
            file, missing = find_data(entry, where, place)
            problems += missing
            files += [] if file is None else [file]
        problems += [
            *read_task(self.task, TUNE_TASKS),
            *check_clusters(self.data, self.held_out, self.task),
            *self._check_phases(),
        ]
        method = TUNE_METHODS.get(self.method)
        if method is None:
            problems.append(unknown_method(self.method, TUNE_METHODS, "tune"))
        else:
            problems += [*self._read_settings(method, where), *self._check_loss(method)]
        refuse([*problems, *self._read_more(where)])
        assert model is not None
        self._model = model
        self._data, self._dev = tuple(files[: len(self.data)]), files[-1] if isinstance(self.dev, str) else None
        return self

    def _read_settings(self, method: TuneMethod[Any], where: Where) -> list[Problem]:
        """Read what depends on the method; the problems."""
        self._settings, problems = read_parameters(method, self._method_parameters)
        if method.loads is not None and self.task != "classification":
            expected = f"classification for {method.name}"
            problems.append(problem_at("task", FOUND, found=repr(self.task), expected=expected))
        if method.needs is not None and self.task in TUNE_TASKS and self.task not in TASKS:
            expected = f"one of {', '.join(TASKS)}, for which there are statistics; or another method"
            problems.append(problem_at("task", FOUND, found=repr(self.task), expected=expected))
        elif (method.needs is None) != (self.stats is None):
            needs = f"the file of `mergekit-lfm stats {method.needs}`" if method.needs else "no file: leave it out"
            problems.append(problem_at("stats", FOUND, found=repr(self.stats), expected=needs))
        elif self.stats is not None:
            found, missing = read_file(self.stats, where, "stats", "a statistics file")
            self._stats, problems = None if found is None else found.path, [*problems, *missing]
        for name, is_set in (("checkpointing", self.checkpointing), ("loss.dpo", "dpo" in self.loss)):
            if method.tasks and is_set:
                problems.append(problem_at(name, FOUND, found="it", expected=f"none for {method.name}"))
        if method.files is not None and self._settings[method.files] != "":
            self._named, missing = read_named(str(self._settings[method.files] or ""), method.files, where)
            problems = [*problems, *missing]
        if self.evaluate_every is not None and self.dev is None:
            problems.append(
                problem_at("evaluate_every", FOUND, found=str(self.evaluate_every), expected="`dev` beside it")
            )
        if self.compares_batches and self.batch_size < 2:
            expected = "2 or more for a loss that compares the examples of a batch"
            problems.append(problem_at("batch_size", FOUND, found=str(self.batch_size), expected=expected))
        if self.compares_batches and self.accumulate > 1:
            expected = "1 for a loss that is about all examples of a batch at once"
            problems.append(problem_at("accumulate", FOUND, found=str(self.accumulate), expected=expected))
        if self.patience is not None and (self.dev is None or self.evaluate_every is None):
            expected = "`dev` and `evaluate_every` beside it"
            problems.append(problem_at("patience", FOUND, found=str(self.patience), expected=expected))
        try:
            self._options = self._make_options(method)
        except PlanError as error:
            problems.append(Problem("", str(error)))
        return problems

    @property
    def _method_parameters(self) -> dict[str, Any]:
        """The parameters that are the method's."""
        return self.parameters

    def _check_loss(self, method: TuneMethod[Any]) -> Iterator[Problem]:
        """The problems of the loss."""
        return check_terms(self.loss, self.task, method.makes)

    def _read_more(self, where: Where) -> Iterable[Problem]:  # noqa: ARG002
        """Read what the job has besides; the problems."""
        return ()

    def _check_phases(self) -> Iterator[Problem]:
        """The problems of the parts that are trained."""
        total = sum(phase.steps for phase in self.phases)
        if self.phases and self.train is not None:
            yield Problem("train", "found beside `phases`, which have their own; expected one of the two")
        if self.phases and "steps" in self.model_fields_set and self.steps != total:
            yield problem_at("steps", FOUND, found=str(self.steps), expected=f"{total}, the sum over the phases")

    def _make_options(self, method: TuneMethod[Any]) -> Options:
        defaults = self._defaults(method)
        names = Options.__dataclass_fields__.keys() - {"groups", "steps"}
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        groups = tuple(Group(**dict(entry)) for entry in self.groups)
        steps = sum(phase.steps for phase in self.phases) or self.steps
        return Options(steps=steps, groups=groups, **{**defaults, **given})

    def _defaults(self, method: TuneMethod[Any]) -> dict[str, Any]:
        """Settings of the steps where the user gives none."""
        return {"learning_rate": method.rate}

    @property
    def found(self) -> FoundModel:
        """The model that is tuned."""
        return self._model

    @property
    def files(self) -> tuple[DataFile, ...]:
        """The files of examples, also of those that are held out."""
        return self._data

    @property
    def parts(self) -> tuple[tuple[int, tuple[str, ...]], ...]:
        """The phases, each its steps and patterns; none where the method decides alone."""
        if self.train is not None:
            return ((self._options.steps, self.train),)
        return tuple((phase.steps, phase.train) for phase in self.phases)

    @property
    def dev_file(self) -> DataFile | None:
        """The file of the development set."""
        return self._dev

    @property
    def dev_share(self) -> float | None:
        """The share of the data that is the development set."""
        return self.dev if isinstance(self.dev, float) else None

    @property
    def compares_batches(self) -> bool:
        """Whether the loss is about all examples of a batch at once."""
        return self.task == "embedding" or any(term in LOSS_TERMS and LOSS_TERMS[term].batch for term in self.loss)

    @property
    def is_labelled(self) -> bool:
        """Whether the labels, or positives, of the data are read."""
        return True

    @property
    def labels_fit(self) -> bool:
        """Whether the labels of the data have to be classes of the model."""
        return True

    @property
    def more_files(self) -> tuple[DataFile, ...]:
        """Files of examples that are read besides those of the training."""
        return ()

    @property
    def by_places(self) -> bool:
        """Whether the tokens of examples need their places in the texts."""
        return False

    @property
    def statistics(self) -> Path | None:
        """The file of Fisher information."""
        return self._stats

    @property
    def named_files(self) -> tuple[DataFile, ...]:
        """The files that a parameter of the method names."""
        return self._named

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the data files without their ends, each of its own."""
        names = list[str]()
        for number, file in enumerate(self.files, 1):
            name = file.path.name.partition(".")[0]
            names.append(f"{name}-{number}" if name in names else name)
        return tuple(names)

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
        options = asdict(self._options)
        options |= {"optimizer": self.optimizer}
        groups = [{k: v for k, v in group.items() if v is not None} for group in options.pop("groups")]
        optional = {key: getattr(self, key) for key in ("dev", "stats", "window") if getattr(self, key) is not None}
        parts: dict[str, Any] = {} if self.train is None else {"train": [*self.train]}
        parts |= {"phases": [phase.model_dump(mode="json") for phase in self.phases]} if self.phases else {}
        parts |= {"held_out": [*self.held_out]} if self.held_out else {}
        return {
            "job": self.job,
            "model": self.model,
            "data": [entry.facts for entry in self.data],
            "task": self.task,
            "method": self.method,
            "parameters": dict(self._settings),
            **optional,
            **({"loss": dict(sorted(self.loss.items()))} if self.loss else {}),
            **parts,
            **{name: value for name, value in options.items() if value is not None},
            **({"groups": groups} if groups else {}),
        }


class TuneRecipe(TrainingRecipe):
    """A tuning as the user wrote it."""

    job: Literal["tune"]
