"""Jobs: the stages of a recipe besides merges, `job: NAME`. One declaration for each, and one table of them.

To add a job, write its recipe's form (`recipe/`), a plan with the members of `JobPlan`, a function that carries it out,
and a module of `commands/show` that prints both; and a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from mergekit_lfm.api.outcome import Outcome
from mergekit_lfm.errors import PlanError, did_you_mean
from mergekit_lfm.recipe.adapter_recipe import AdapterRecipe
from mergekit_lfm.recipe.distill_recipe import DistillRecipe
from mergekit_lfm.recipe.eval_recipe import EvalRecipe
from mergekit_lfm.recipe.extract_recipe import ExtractRecipe
from mergekit_lfm.recipe.generate_recipe import GenerateRecipe
from mergekit_lfm.recipe.head_recipe import HeadRecipe
from mergekit_lfm.recipe.meta_recipe import MetaRecipe
from mergekit_lfm.recipe.meta_teachers import TeachersRecipe
from mergekit_lfm.recipe.registry import TUNE_METHODS
from mergekit_lfm.recipe.stats_recipe import StatsRecipe
from mergekit_lfm.recipe.student_recipe import StudentRecipe
from mergekit_lfm.recipe.synthesise_recipe import SynthesiseRecipe
from mergekit_lfm.recipe.tune_recipe import TuneRecipe


class JobRecipe(Protocol):
    """The recipe of a job. output: the folder of its result, if the recipe names one."""

    @property
    def output(self) -> str | None: ...


class JobRequest(Protocol):
    """The request that the result of a job answers, and that the lock in its folder names.

    paths: those that are read, by their names in messages. is_answered: whether the folder is the result, whole; raises
    PlanError if it must not be written. is_of: whether its lock is that of the request.
    """

    @property
    def paths(self) -> Mapping[str, Path]: ...
    def is_answered(self, out: Path, /, *, overwrite: bool) -> bool: ...
    def is_of(self, out: Path, /) -> bool: ...


class JobPlan(Protocol):
    """A job that is checked, and not done yet.

    `stand_in` writes a folder like the result, from headers alone: later stages are planned on it.
    """

    @property
    def out(self) -> Path: ...
    @property
    def request(self) -> JobRequest: ...
    @property
    def notices(self) -> tuple[str, ...]: ...
    def stand_in(self, folder: Path, /) -> None: ...


SAFETENSORS = ".safetensors"


def _no_suffix(_: Mapping[str, Any]) -> str:
    return ""


@dataclass(frozen=True)
class Job:
    """A kind of stage besides merges.

    makes: its result in words. parse: reads a document, with the arguments of `Recipe.parse`. plan: from its recipe and
    the place of the result to a `JobPlan`; plan_options: the options of `plan_recipe` that it takes. run: carries a
    plan out; run_options: the options of `run_recipe` that it takes besides `overwrite` and `progress`. show: the
    module of `commands/show` that prints plans and outcomes. suffix: the end of the result's name, from the document:
    that of a file, or "" for a folder.
    """

    name: str
    makes: str
    parse: Callable[..., JobRecipe]
    plan: Callable[..., JobPlan]
    run: Callable[..., Outcome[Any]]
    show: str
    suffix: Callable[[Mapping[str, Any]], str] = _no_suffix
    plan_options: frozenset[str] = frozenset()
    run_options: frozenset[str] = frozenset()


def _later(name: str) -> Callable[..., Any]:
    """A function of this room, whose module is imported when it is called: it may need torch."""
    module, _, function = name.rpartition(".")

    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(import_module(f"mergekit_lfm.api.{module}"), function)(*arguments, **options)

    return call


def _suffix_of_tuning(data: Mapping[str, Any]) -> str:
    """The end of the name of what a method makes: a patch, an attachment, a mixture or a template is a file."""
    method = TUNE_METHODS.get(str(data.get("method")))
    return SAFETENSORS if method is not None and method.makes in ("patch", "attachment", "mixture", "template") else ""


def _training(
    name: str, makes: str, parse: Callable[..., JobRecipe], plan: str, *, show: str, run: str = "tune.tune_planned"
) -> Job:
    """A job that trains a model. plan, run: names of functions of this room."""
    return Job(
        name=name,
        makes=makes,
        parse=parse,
        plan=_later(plan),
        run=_later(run),
        show=show,
        suffix=_suffix_of_tuning,
        plan_options=frozenset({"device"}),
        run_options=frozenset({"threads"}),
    )


ADAPTERS = Job(
    name="adapters",
    makes="an adapter",
    parse=AdapterRecipe.parse,
    plan=_later("adapter_plans.plan_adapter_recipe"),
    run=_later("adapters.merge_adapter_recipe"),
    show="adapters",
    plan_options=frozenset({"seed"}),
)
EXTRACT = Job(
    name="extract",
    makes="an adapter",
    parse=ExtractRecipe.parse,
    plan=_later("extraction_plans.plan_extract"),
    run=_later("extract.extract_planned"),
    show="extractions",
    plan_options=frozenset({"device"}),
    run_options=frozenset({"memory", "threads"}),
)
TUNE = _training("tune", "a tuned model", TuneRecipe.parse, "tune_plans.plan_tuning", show="tunings")
DISTILL = _training(
    "distill", "a student of other models", DistillRecipe.parse, "distill_plans.plan_distillation", show="distillations"
)
META = _training(
    "meta",
    "an initialisation",
    MetaRecipe.parse,
    "meta_plans.plan_meta",
    run="meta.meta_planned",
    show="initialisations",
)
META_TEACHERS = Job(
    name="meta",
    makes="an initialisation",
    parse=TeachersRecipe.parse,
    plan=_later("meta_teachers_plans.plan_from_teachers"),
    run=_later("meta_teachers.initialise_planned"),
    show="from_teachers",
    plan_options=frozenset({"device"}),
    run_options=frozenset({"threads"}),
)
STATS = Job(
    name="stats",
    makes="a statistics file",
    parse=StatsRecipe.parse,
    plan=_later("stats_plans.plan_stats"),
    run=_later("stats_plans.collect_planned"),
    show="statistics",
    suffix=lambda _: SAFETENSORS,
    plan_options=frozenset({"device"}),
    run_options=frozenset({"memory", "threads"}),
)
EVAL = Job(
    name="eval",
    makes="a file of scores",
    parse=EvalRecipe.parse,
    plan=_later("eval_plans.plan_eval"),
    run=_later("eval_plans.evaluate_planned"),
    show="scores",
    suffix=lambda _: ".json",
    plan_options=frozenset({"device"}),
    run_options=frozenset({"threads"}),
)
GENERATE = Job(
    name="generate",
    makes="a file of texts",
    parse=GenerateRecipe.parse,
    plan=_later("generate_plans.plan_texts"),
    run=_later("generate.write_planned"),
    show="generations",
    suffix=lambda _: ".jsonl",
    plan_options=frozenset({"device"}),
    run_options=frozenset({"threads"}),
)
HEAD = Job(
    name="head",
    makes="a model with a new head",
    parse=HeadRecipe.parse,
    plan=_later("heads.plan_head"),
    run=_later("heads.make_head"),
    show="heads",
)
STUDENT = Job(
    name="student",
    makes="a smaller model",
    parse=StudentRecipe.parse,
    plan=_later("students.plan_student"),
    run=_later("students.make_planned_student"),
    show="students",
)
SYNTHESISE = Job(
    name="synthesise",
    makes="a file of images",
    parse=SynthesiseRecipe.parse,
    plan=_later("synthesise_plans.plan_synthesis"),
    run=_later("synthesise.make_planned_images"),
    show="synthetic",
    suffix=lambda _: ".npz",
    plan_options=frozenset({"device"}),
    run_options=frozenset({"threads"}),
)
JOBS: Mapping[str, Job] = {
    job.name: job for job in (ADAPTERS, DISTILL, EVAL, EXTRACT, GENERATE, HEAD, META, STATS, STUDENT, SYNTHESISE, TUNE)
}


def find_job(data: object, label: str) -> Job | None:
    """The job of a document, None for a merge. Raises PlanError for one that is not here."""
    name = data.get("job") if isinstance(data, Mapping) else None
    if name is None:
        return None
    if not isinstance(name, str) or name not in JOBS:
        sentence = "{place}: job {found}: expected {expected}, or no `job` for a merge; {cure}"
        expected = " or ".join(JOBS)
        raise PlanError(sentence, place=label, found=name, expected=expected, cure=did_you_mean(name, JOBS))
    return META_TEACHERS if name == META.name and isinstance(data, Mapping) and "teachers" in data else JOBS[name]
