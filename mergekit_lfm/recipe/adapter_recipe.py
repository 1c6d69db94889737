"""Recipes of `job: adapters`: adapters merged among themselves, to one adapter. Checked completely before any work."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationInfo, model_validator

from mergekit_lfm.errors import PlanError
from mergekit_lfm.methods.method import Method
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.recipe.files import Where, find_model, find_reference
from mergekit_lfm.recipe.foreign import unknown_method
from mergekit_lfm.recipe.form import AdapterEntry, Dtype, Parameters, Reference, read_reference
from mergekit_lfm.recipe.job_form import JobForm
from mergekit_lfm.recipe.parts import Input, Part, Scope
from mergekit_lfm.recipe.problems import Problem, attempt, problem_at, refuse
from mergekit_lfm.recipe.requirements import unset_parameters
from mergekit_lfm.recipe.roles import read_scope, read_settings
from mergekit_lfm.recipe.values import Rule, as_data, find_rule, value_of
from mergekit_lfm.store.elsewhere import Elsewhere

JOB = "adapters"
SPACES = ("product", "knots", "core")
# PEFT's names for the plain weighted sum, whose weights it does not normalise: at all ranks, or at the largest.
SUMS = ("cat", "svd")


@dataclass(frozen=True, slots=True)
class Line:
    """One adapter of a recipe: as written, where it is, and the share of what it does."""

    input: Input
    scale: float


class AdapterRecipe(JobForm):
    """A merge of adapters as the user wrote it.

    space: in which a method runs: on the products of each adapter's matrices, or on their coordinates in a basis that
    they share ("knots", "core"). rank: of the result, at most; or energy: the share of the squares of the merged change
    that it keeps at least. base_model: has the values that tensors which are saved whole were trained from.

    Build one with `AdapterRecipe.parse`. Paths are as of a merge's `Recipe`.
    """

    EXPECTED: ClassVar[str] = "a mapping with adapters"

    job: Literal["adapters"]
    merge_method: str
    adapters: tuple[AdapterEntry, ...]
    parameters: Parameters = Field(default_factory=dict)
    space: Literal["product", "knots", "core"] = "product"
    rank: int | None = Field(default=None, strict=True, ge=1)
    energy: float | None = Field(default=None, strict=True, gt=0, le=1)
    base_model: Reference | None = None
    dtype: Dtype = "float32"
    seed: int = Field(default=0, strict=True, ge=0, lt=2**64)
    output: Annotated[str | None, BeforeValidator(read_reference)] = None

    _part: Part = PrivateAttr()
    _lines: tuple[Line, ...] = PrivateAttr()
    _base: Path | Elsewhere | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        context = info.context or {"where": Where(), "whole": True}
        where: Where = context["where"]
        method = self._find_method()
        scope, notices, problems = read_scope(self.parameters, [method], "parameters")
        if self.merge_method in SUMS and "normalize" not in scope.settings:
            scope = Scope(scope.place, {**scope.settings, "normalize": (Rule(None, (False,)),)})
        lines = list[Line]()
        for i, entry in enumerate(self.adapters):
            place = f"adapters[{i}]"
            find = partial(_find_adapter, entry.adapter, where)
            source, missing = attempt(find, f"{place}.adapter")
            settings, told, wrong = read_settings(entry.parameters, [method], f"{place}.parameters", own=True)
            labels = {line.input.label for line in lines}
            copies = (entry.adapter, *(f"{entry.adapter} ({n})" for n in range(2, i + 2)))
            name = next(copy for copy in copies if copy not in labels)
            model = Input(entry.adapter, source or Path(entry.adapter), name, place=place, settings=settings)
            lines.append(Line(model, entry.scale))
            problems += [*missing, *wrong]
            notices += told
        if self.base_model is not None:
            found, missing = attempt(partial(_find_base, self.base_model, where), "base_model")
            self._base, problems = found, [*problems, *missing]
        if self.rank is not None and self.energy is not None:
            problems.append(Problem("rank", "found `rank` and `energy`, expected one of them; leave the other out"))
        inputs = tuple(line.input for line in lines)
        part = Part(method.name, None, inputs, inputs, (scope,), "adapters")
        if context["whole"]:
            problems = problems or [*_lacking(part), *unset_parameters(part), *_too_wide(part)]
        refuse(list({str(problem): problem for problem in problems}.values()))
        self._part, self._lines, self._notices = part, tuple(lines), tuple(dict.fromkeys(notices))
        return self

    def _find_method(self) -> Method:
        """The method. Raises PlanError for an unknown one, and for one that needs more than changes."""
        if self.merge_method in SUMS:
            return METHODS["linear"]
        usable = [name for name, method in METHODS.items() if merges_changes(method)]
        if self.merge_method in METHODS and self.merge_method not in usable:
            raise PlanError(
                "{place}: {found} {why}; {cure}",
                place="merge_method",
                found=self.merge_method,
                why="needs models or their statistics, expected a method that merges changes",
                cure=f"choose one of {', '.join(sorted([*usable, *SUMS]))}",
            )
        if self.merge_method not in usable:
            sentence, words = unknown_method(self.merge_method, [*usable, *SUMS])
            raise PlanError("{place}: " + sentence, place="merge_method", **words)
        return METHODS[self.merge_method]

    @property
    def part(self) -> Part:
        """The method, the adapters as its inputs, and all settings."""
        return self._part

    @property
    def lines(self) -> tuple[Line, ...]:
        """The adapters, in order."""
        return self._lines

    @property
    def base(self) -> Path | Elsewhere | None:
        """The model that saved tensors were trained from, if the recipe names it."""
        return self._base

    def normalised(self) -> dict[str, Any]:
        """The recipe in one canonical JSON-able form, which parses back to the same merge on any machine."""
        lines = [
            {"adapter": line.input.ref}
            | ({} if line.scale == 1 else {"scale": line.scale})
            | {"parameters": {name: as_data(setting) for name, setting in sorted(line.input.settings.items())}}
            for line in self.lines
        ]
        (scope,) = self.part.scopes
        return {
            "job": JOB,
            "merge_method": self.merge_method,
            "adapters": lines,
            "parameters": {name: as_data(setting) for name, setting in sorted(scope.settings.items())},
            "space": self.space,
            **({} if self.rank is None else {"rank": self.rank}),
            **({} if self.energy is None else {"energy": self.energy}),
            **({} if self.base_model is None else {"base_model": self.base_model}),
            "dtype": self.dtype,
            "seed": self.seed,
        }


def merges_changes(method: Method) -> bool:
    """Whether a method merges changes to a base, so that none has to be there; or is a plain sum."""
    return method.statistics is None and (method.base in ("required", "optional") or method.name == "linear")


def _find_adapter(ref: str, where: Where) -> Path | Elsewhere:
    """The adapter's folder, file or name elsewhere, or the result of a stage. Raises ValueError."""
    return where.stages[ref] if ref in where.stages else find_model(ref, where.folder)


def _find_base(ref: str, where: Where) -> Path | Elsewhere:
    found = find_reference(ref, where)
    if found.adapters:
        raise PlanError(f"found {ref!r}, a model with adapters, expected the model that they were trained from")
    return found.source


def _lacking(part: Part) -> list[Problem]:
    """The adapters that the method lacks, or has too many of."""
    (least, most), count = part.method.inputs, len(part.inputs)
    if least <= count and (most is None or count <= most):
        return []
    wanted = f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
    words = {"expected": f"{wanted} adapter{'' if wanted.endswith(' 1') else 's'}", "found": f"{count}"}
    return [problem_at("adapters", "{method} takes {expected}; found {found}", method=part.method.name, **words)]


def _too_wide(part: Part) -> list[Problem]:
    """A problem if the method would find one threshold over all modules at once."""
    shared = {}
    for parameter in part.parameters_of(None):
        settings = part.scopes[0].settings.get(parameter.name, ())
        rule = find_rule(settings, "")
        shared[parameter.name] = parameter.default if rule is None else value_of(rule, parameter, None)
    if part.method.scope(shared) != "model":  # type: ignore[arg-type]
        return []
    text = "adapters are merged module by module; use `scope: tensor`, or merge the models with the adapters applied"
    return [Problem("parameters.scope", text)]
