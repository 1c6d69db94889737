"""Explain tensors of a plan: where each comes from, and which line of the recipe gives each of its parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import translate
from functools import cache

from mergekit_lfm.errors import PlanError, several
from mergekit_lfm.methods.method import Value
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.plan.job import Job
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.recipe.parts import Input, Part, copy_of
from mergekit_lfm.store.yaml import line_finder

NEAREST = 3  # names that a message about an unknown one lists


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor that goes into one of the output. role: input, base, statistics or edit. model: or file."""

    role: str
    model: str
    tensor: str


@dataclass(frozen=True, slots=True)
class ValueOrigin:
    """A parameter's value for a tensor and one model, or all models if `model` is not given.

    place: in the recipe, None for the method's default; line: of its file, None without one.
    """

    parameter: str
    model: str | None
    value: Value
    place: str | None
    line: int | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """All that decides about one tensor of the output. layer: its index and their number. stage: of the recipe."""

    name: str
    names: tuple[str, ...]
    layer: tuple[int, int] | None
    method: str
    dtype: str
    arithmetic: str
    sources: tuple[Source, ...]
    values: tuple[ValueOrigin, ...]
    stage: str = ""


def explain(plan: Plan, patterns: Sequence[str], text: str | None, document: int = 0) -> tuple[Explanation, ...]:
    """The explanations of all tensors that a pattern matches. * and ? in it match as in names of files.

    text: of the recipe, in which it is one of the documents; None for a recipe that is not in YAML.
    """
    matching = [_matcher(pattern) for pattern in patterns]
    line_of = _no_line if text is None else cache(line_finder(text, document))
    jobs = [job for job in plan.tensors if any(match(name) for match in matching for name in job.names)]
    return tuple(_explain(plan, job, line_of) for job in jobs)


def _no_line(place: str) -> int | None:  # noqa: ARG001
    """The line of a place in a recipe without text."""
    return None


def refuse_unmatched_patterns(plans: Sequence[Plan], patterns: Sequence[str]) -> None:
    """Raise PlanError about each pattern that matches no tensor, with the nearest names."""
    names = list(dict.fromkeys(name for plan in plans for job in plan.tensors for name in job.names))
    problems = []
    for pattern in patterns:
        if any(map(_matcher(pattern), names)):
            continue
        near = get_close_matches(pattern, names, NEAREST, cutoff=0.3) or names[:NEAREST]
        problems.append(f"no tensor of the output is named {pattern!r}; the nearest are {', '.join(near)}")
    if problems:
        raise PlanError(several("unknown tensors", problems))


def _matcher(pattern: str) -> Callable[[str], object]:
    return re.compile(translate(pattern.replace("[", "[[]"))).match


def _explain(plan: Plan, job: Job, line_of: Callable[[str], int | None]) -> Explanation:
    number = plan.part_of.get(job.name, 0)
    parts = plan.recipe.parts
    part = parts[number] if number < len(parts) else copy_of(plan.recipe.template, "modules", None)
    return Explanation(
        job.name,
        job.names,
        job.layer,
        job.method,
        job.dtype,
        job.compute,
        tuple(_sources(plan, job, part)),
        tuple(_values(job, part, line_of)),
    )


def _sources(plan: Plan, job: Job, part: Part) -> Iterator[Source]:
    for i, (origin, name) in job.match.sources.items():
        model = part.models[i]
        is_base = part.base is not None and model == part.base
        yield Source("base" if is_base else "input", model.label, plan.sources[origin].name_in_files(name))
    labels = plan.source_labels
    yield from (Source("statistics", labels[origin], name) for origin, name in job.statistics)
    if job.added is not None:
        yield Source("edit", labels[job.added[0]], job.added[1])


def _values(job: Job, part: Part, line_of: Callable[[str], int | None]) -> Iterator[ValueOrigin]:
    """The values of all parameters of the job's method, the shared ones first."""
    method = METHODS.get(job.method)
    declared = {parameter.name: parameter for parameter in part.method.parameters}
    for model, settings in [(None, job.settings.shared), *zip(part.inputs, job.settings.inputs, strict=True)]:
        for parameter in () if method is None else method.parameters:
            if parameter.name not in settings:
                continue
            value, own, place = settings[parameter.name], declared.get(parameter.name), None
            if own is not None:  # an average takes over some parameters of the part's method, and changes others
                found, place = part.find(own, model, _name_in(model, job, part), job.layer)
                place = place if found == value else None
            label = None if model is None else model.label
            yield ValueOrigin(parameter.name, label, value, place, None if place is None else line_of(place))


def _name_in(model: Input | None, job: Job, part: Part) -> str:
    """The name that filters for a model look at: of slices and modules the model's own."""
    if model is None or (part.slice is None and part.module is None):
        return job.spec.name
    return job.match.sources.get(part.models.index(model), (0, job.spec.name))[1]
