"""Recipes of `job: meta`: an initialisation from many tasks. Checked before any work, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PrivateAttr

from mergekit_lfm.errors import did_you_mean
from mergekit_lfm.methods.kinds import TuneMethod
from mergekit_lfm.methods.method import Value
from mergekit_lfm.recipe.files import FoundModel, Where, find_reference
from mergekit_lfm.recipe.form import Reference, Strict
from mergekit_lfm.recipe.meta_algorithms import ALGORITHMS, Algorithm
from mergekit_lfm.recipe.options import defaults_of, read_options, readers_of
from mergekit_lfm.recipe.problems import Problem, attempt, problem_at
from mergekit_lfm.recipe.tune_data import DataFile, Entries, find_data
from mergekit_lfm.recipe.tune_options import check_makes
from mergekit_lfm.recipe.tune_recipe import TrainingRecipe
from mergekit_lfm.recipe.values import FOUND
from mergekit_lfm.recipe.without_data import WITHOUT_DATA

RATES, STEPS = (0.003, 0.01, 0.03, 0.1, 0.3), (1, 5, 10)  # the grid of the test
# Settings of a training that a loss over episodes has no place for.
UNUSED = ("loss", "dev", "train", "phases", "held_out", "checkpointing", "autocast", "evaluate_every", "patience")
ON_DISK_UNUSED = ("queries", "accumulate", "weight_decay", "clip", "groups")  # the outer step is a merge
PROMPTS = ("prompt", "p_tuning")  # methods whose prompt is a function of parameters, as torch.func needs it
CHANGING = ("mask", "lp_ft", "layerwise")  # methods whose trained part is another one in each step


def _as_numbers(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class TestEntry(Strict):
    """How an initialisation is judged, on tasks that it has not seen.

    data: files of such tasks. episodes: how many give the score, and how many others choose the cell of the grid of
    rates and steps by which a start adapts. joint_rate: the learning rate of the joint training beside it.
    """

    data: Entries
    episodes: int = Field(default=100, strict=True, ge=2)
    rates: Annotated[tuple[float, ...], BeforeValidator(_as_numbers), Field(min_length=1)] = RATES
    steps: Annotated[tuple[int, ...], BeforeValidator(_as_numbers), Field(min_length=1)] = STEPS
    joint_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @property
    def facts(self) -> dict[str, Any]:
        """The entry as data."""
        whole = self.model_dump(mode="json", exclude_none=True)
        return {**whole, "data": [entry.facts for entry in self.data]}


class TextsEntry(Strict):
    """Names of classes, by label, and the model of embeddings that makes vectors of them."""

    model: Reference
    names: dict[int, Annotated[str, Field(min_length=1)]] = Field(min_length=1)


class MetaRecipe(TrainingRecipe):
    """A meta-learning as the user wrote it. algorithm: one of `ALGORITHMS`; method: of `tune`, what is learned.

    parameters: of both. ways: classes of an episode; without it each data file is a task. shots, queries: examples to
    adapt on, and to judge by, of each class, or of each file. inner_steps, inner_rate: of adapting; by default the
    algorithm's. steps: outer ones, each over `batch_size` tasks. test: how the result, the start, a random start and
    joint training are judged. on_disk: of reptile, whose tasks are files: the models of the tasks are checkpoints,
    merged by the engine. texts: of film, the names of classes.
    """

    EXPECTED: ClassVar[str] = "a mapping with model, data, task and algorithm"
    VERB: ClassVar[str] = "meta-learning"

    job: Literal["meta"]
    algorithm: str = "maml"
    ways: int | None = Field(default=None, strict=True, ge=2)
    shots: int = Field(default=5, strict=True, ge=1)
    queries: int = Field(default=15, strict=True, ge=1)
    inner_steps: int | None = Field(default=None, strict=True, ge=1)
    inner_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    test: TestEntry | None = None
    on_disk: bool = Field(default=False, strict=True)
    texts: TextsEntry | None = None
    batch_size: int = Field(default=4, strict=True)

    _tests: tuple[DataFile, ...] = PrivateAttr(default=())
    _own: dict[str, Value] = PrivateAttr(default_factory=dict)
    _texts: FoundModel | None = PrivateAttr(default=None)

    @property
    def row(self) -> Algorithm:
        """The algorithm."""
        return ALGORITHMS[self.algorithm]

    @property
    def inner(self) -> tuple[int, float]:
        """The steps of adapting, and their rate."""
        return self.inner_steps or self.row.inner_steps, self.inner_rate or self.row.inner_rate

    @property
    def labels_fit(self) -> bool:
        return self.ways is None  # else they are those of the data, and an episode has its own

    @property
    def is_labelled(self) -> bool:
        return True

    @property
    def compares_batches(self) -> bool:
        return False  # a batch is tasks, each compared by itself

    @property
    def more_files(self) -> tuple[DataFile, ...]:
        return self._tests

    def _read_settings(self, method: TuneMethod[Any], where: Where) -> list[Problem]:
        row = ALGORITHMS.get(self.algorithm)
        own = readers_of(() if row is None else row.parameters)
        given = {name: value for name, value in self.parameters.items() if name in own}
        values, problems = read_options(given, own, self.algorithm, "parameters")
        self._own = {**defaults_of(() if row is None else row.parameters), **values}
        return [*problems, *super()._read_settings(method, where)]

    @property
    def _method_parameters(self) -> dict[str, Any]:
        return {name: value for name, value in self.parameters.items() if name not in self._own}

    @property
    def found_texts(self) -> FoundModel | None:
        """The model that makes vectors of the names of classes."""
        return self._texts

    @property
    def own_settings(self) -> Mapping[str, Value]:
        """A value for each parameter of the algorithm."""
        return self._own

    def _check_loss(self, method: TuneMethod[Any]) -> Iterator[Problem]:
        row = ALGORITHMS.get(self.algorithm)
        if row is None:
            cure = did_you_mean(self.algorithm, ALGORITHMS)
            if self.algorithm in WITHOUT_DATA:
                cure = f"{self.algorithm} needs no data: give `teachers` in place of `data`, or use `meta-teachers`"
            sentence = FOUND + "; {cure}"
            yield problem_at(
                "algorithm", sentence, found=repr(self.algorithm), expected=", ".join(ALGORITHMS), cure=cure
            )
            return
        if method.name not in PROMPTS:
            yield from check_makes(method)
        if method.name in CHANGING:
            yield problem_at("method", FOUND, found=method.name, expected="one that trains the same part in each step")
        if self.task not in row.tasks:
            yield problem_at("task", FOUND, found=repr(self.task), expected=f"{' or '.join(row.tasks)} for {row.name}")
        if row.own_file and method.makes not in ("checkpoint", "adapter", "prompt"):
            expected = f"one that makes a folder, into which {row.name} puts a file"
            yield problem_at("method", FOUND, found=method.name, expected=expected)
        for name in UNUSED:
            if getattr(self, name) not in (None, False, (), {}):
                yield problem_at(name, FOUND, found="it", expected="none in a meta-learning; leave it out")
        if self.ways is not None and self.task != "classification":
            yield problem_at("ways", FOUND, found=str(self.ways), expected="none for a task without classes")
        yield from self._check_tasks(row)
        yield from self._check_on_disk(row)
        if not row.adapts and (self.inner_steps or self.inner_rate):
            yield problem_at("inner_steps", FOUND, found="it", expected=f"none for {row.name}, which does not adapt")

    def _check_tasks(self, row: Algorithm) -> Iterator[Problem]:
        """The problems of the tasks, and of how many a step has."""
        if self.ways is None and (row.kind == "metric" or row.named):
            yield problem_at("ways", FOUND, found="none", expected=f"the classes of an episode, for {row.name}")
        if self.ways is None and len(self.data) < 2:
            expected = "several, each a task, or `ways` for episodes of classes"
            yield problem_at("data", FOUND, found="one file", expected=expected)
        if self.ways is not None and (row.kind == "edits" or row.crosses):
            of = "the first of changed answers" if row.kind == "edits" else "each a domain"
            yield problem_at("ways", FOUND, found=str(self.ways), expected=f"none for {row.name}: data files, {of}")
        if row.kind == "edits" and self.test is not None and len(self.test.data) < 2:
            yield problem_at("test.data", FOUND, found="one file", expected="two or more, as `data` has them")
        if row.learns_steps and self.inner[1] >= 1:
            expected = f"a number below 1 for {row.name}, whose first steps are a share of the slope"
            yield problem_at("inner_rate", FOUND, found=f"{self.inner[1]:g}", expected=expected)
        if row.crosses and self.batch_size < 2:
            yield problem_at("batch_size", FOUND, found="1", expected=f"2 or more for {row.name}, which compares tasks")
        if row.named != (self.texts is not None):
            expected = "{model, names} for film, in a recipe or in Python" if row.named else f"none for {row.name}"
            yield problem_at("texts", FOUND, found="none" if row.named else "it", expected=expected)
        if row.whole and self.accumulate > 1:
            expected = f"1 for {row.name}, whose steps are not cut into parts"
            yield problem_at("accumulate", FOUND, found=str(self.accumulate), expected=expected)
        if self.batch_size % int(self._own.get("group_count") or 1):
            expected = f"a multiple of group_count, {self._own['group_count']}"
            yield problem_at("batch_size", FOUND, found=str(self.batch_size), expected=expected)

    def _check_on_disk(self, row: Algorithm) -> Iterator[Problem]:
        """The problems of a meta-learning over checkpoints."""
        for name, is_wrong, expected in (
            ("algorithm", row.kind != "reptile", "reptile, whose outer step is a merge"),
            ("method", self.method != "full", "full, which makes checkpoints"),
            ("ways", self.ways is not None, "none: each data file is a task"),
            ("test", self.test is not None, "none: tune and judge the result in later stages"),
            ("optimizer", self.optimizer not in (None, "sgd"), "sgd: a plain step towards the tasks' models"),
        ):
            if self.on_disk and is_wrong:
                yield problem_at(name, FOUND, found=str(getattr(self, name)), expected=f"{expected}, with on_disk")
        for name in ON_DISK_UNUSED:
            if self.on_disk and getattr(self, name) not in (type(self).model_fields[name].default, 0):
                yield problem_at(name, FOUND, found="it", expected="none with on_disk; leave it out")

    def _defaults(self, method: TuneMethod[Any]) -> dict[str, Any]:
        row, found = ALGORITHMS.get(self.algorithm), super()._defaults(method)
        if row is None:
            return found
        found |= {"optimizer": row.optimizer}
        found |= {"learning_rate": row.rate} if row.rate is not None and self.optimizer in (None, row.optimizer) else {}
        return found | ({"clip": row.clip} if row.clip is not None else {})

    def _read_more(self, where: Where) -> Iterable[Problem]:
        files = list[DataFile]()
        for i, entry in enumerate(self.test.data if self.test is not None else ()):
            file, problems = find_data(entry, where, f"test.data[{i}].path")
            yield from problems
            files += [] if file is None else [file]
        self._tests = tuple(files)
        if self.texts is not None:
            self._texts, problems = attempt(partial(find_reference, self.texts.model, where), "texts.model")
            yield from problems
        if self.test is not None:
            yield from check_grid(self.test)

    def normalised(self) -> dict[str, Any]:
        steps, rate = self.inner
        own: dict[str, Any] = {"algorithm": self.algorithm, "shots": self.shots, "queries": self.queries}
        own |= {"ways": self.ways} if self.ways is not None else {}
        own |= {"inner_steps": steps, "inner_rate": rate} if self.row.adapts else {}
        own |= {"test": self.test.facts} if self.test is not None else {}
        own |= {"on_disk": True} if self.on_disk else {}
        own |= {"texts": self.texts.model_dump(mode="json")} if self.texts is not None else {}
        whole = super().normalised()
        parameters = {"parameters": {**whole["parameters"], **self._own}}
        return {**whole, **parameters, **own, "optimizer": self.options.optimizer}


def check_grid(test: TestEntry) -> Iterator[Problem]:
    """The problems of a grid of rates and steps."""
    if any(not 0 < rate < math.inf for rate in test.rates):
        yield problem_at("test.rates", FOUND, found=str([*test.rates]), expected="numbers above 0")
    if any(count < 0 for count in test.steps):
        yield problem_at("test.steps", FOUND, found=str([*test.steps]), expected="whole numbers of 0 or more")
