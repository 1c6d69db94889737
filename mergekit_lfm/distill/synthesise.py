"""`synthesise`: one function for all presets: images without data, and a student that learned from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mergekit_lfm.distill.amalgam import Amalgam
from mergekit_lfm.distill.amalgamation import shared_sizes
from mergekit_lfm.distill.generate import generate
from mergekit_lfm.distill.generation import Generation
from mergekit_lfm.distill.generators import Generator, build
from mergekit_lfm.distill.image_terms import COMPARING
from mergekit_lfm.distill.invert import Facts, Inversion, invert
from mergekit_lfm.distill.learner import Learner, Learning, learn
from mergekit_lfm.distill.making import Making
from mergekit_lfm.distill.metadata import Clusters, with_records
from mergekit_lfm.distill.passes import Moments, class_count
from mergekit_lfm.distill.samples import Samples
from mergekit_lfm.distill.stack import Stack
from mergekit_lfm.distill.wild import choose_wild
from mergekit_lfm.errors import PlanError, did_you_mean
from mergekit_lfm.recipe.synthesise_presets import Family, Preset, check_needs, find_preset
from mergekit_lfm.runtime.batchnorm import batchnorms
from mergekit_lfm.train.examples import seed_of
from mergekit_lfm.train.loop import Tell

S = TypeVar("S")
Options = Mapping[str, Any]
NO_OPTIONS: Options = MappingProxyType({})
COUNT, STUDENT_STEPS = 256, 1200  # images that gradients make or that are chosen, and steps of a student on these
# Arguments that a family does not read.
UNREAD: Mapping[Family, tuple[str, ...]] = {
    "pixels": ("generation",),
    "generator": ("count", "student_steps", "inversion"),
    "wild": ("inversion", "generation"),
}


@dataclass(frozen=True)
class Given:
    """Facts that a user has besides a teacher. records, clusters: of it on its data. images: of another kind."""

    records: Mapping[str, Moments] | None = None
    clusters: Clusters | None = None
    images: Tensor | None = None


@dataclass(frozen=True)
class Synthesis:
    """Images, and the course of their making: the terms at the end of a batch or a round, and the student's losses."""

    samples: Samples
    record: tuple[Mapping[str, float], ...]
    losses: tuple[float, ...]


def synthesise(
    teacher: nn.Module | Sequence[nn.Module],
    student: nn.Module | None,
    preset: str | Preset,
    shape: tuple[int, int, int],
    *,
    given: Given | None = None,
    count: int | None = None,
    student_steps: int | None = None,
    low: float = 0.0,
    high: float = 1.0,
    seed: int = 0,
    tell: Tell | None = None,
    inversion: Options = NO_OPTIONS,
    generation: Options = NO_OPTIONS,
    learning: Options = NO_OPTIONS,
    making: Making | None = None,
) -> Synthesis:
    """Make images for a teacher by a preset, and train a student on them, in place.

    teacher: one, or several of other classes each; the student has all these in their order. shape: of an image,
    channels, height and width; low, high: the range of its pixels. count: images that are made or chosen, by default
    256; student_steps: on these, by default 1,200. A generator makes new ones for each of its rounds instead. Without a
    student, presets that need none only make images. inversion, generation, learning: settings of `Inversion`,
    `Generation` and `Learning` in place of the preset's. making: keeps a state, from which a killed run goes on. A
    teacher without BatchNorm needs records, which take its place. Raises PlanError with all that a preset needs and is
    not given, and for arguments and settings that it does not read.
    """
    row = find_preset(preset) if isinstance(preset, str) else preset
    teacher = teacher if isinstance(teacher, nn.Module) else Amalgam(teacher)
    given = given or Given()
    _refuse_unread(row, student, count, student_steps, inversion, generation, learning)
    row = _fit(row, teacher, student, given)
    how = _settle(Inversion, {"low": low, "high": high, **row.inversion, **inversion})
    study = _settle(Learning, {**row.learning, **learning})
    rounds = _settle(Generation, {**row.generation, **generation})
    making = making or Making()
    if row.family == "generator":
        assert student is not None
        with making.running():
            return _by_generator(teacher, student, row, shape, given, (low, high), rounds, study, seed, tell, making)
    if study.memory != "none":
        raise PlanError(f"found the memory {study.memory!r}; {row.name} has all its images at hand. Leave it out")
    count, steps = count or COUNT, student_steps or STUDENT_STEPS
    classes, learner = class_count(teacher), None
    if student is not None:
        learner = Learner(student, classes, study, steps, seed, (how.low, how.high))
        learner.join(making)
    with making.running():
        if row.family == "pixels":
            samples = _by_gradients(teacher, learner, row, shape, given, how, count, steps, seed, tell, making)
        else:
            assert given.images is not None
            samples = choose_wild(teacher, given.images, count)
            if learner is not None:
                learn(learner, (samples.images, samples.scores), steps, making)
    losses = tuple(line["student"] for line in making.record if "student" in line)
    lines = [line for line in making.record if "student" not in line]
    return Synthesis(samples, tuple(lines[how.steps - 1 :: how.steps]), losses)


def _by_gradients(
    teacher: nn.Module,
    learner: Learner | None,
    row: Preset,
    shape: tuple[int, int, int],
    given: Given,
    options: Inversion,
    count: int,
    steps: int,
    seed: int,
    tell: Tell | None,
    making: Making,
) -> Samples:
    """Images made in rounds; after each one the student learns from all so far."""
    if count < 2 * row.rounds:
        raise PlanError(
            f"count is {count}; expected at least {2 * row.rounds}, as {row.name} makes images in {row.rounds} rounds"
        )
    samples = None
    for number, (size, part) in enumerate(zip(_shares(count, row.rounds), _shares(steps, row.rounds), strict=True)):
        student = learner.student if learner is not None and number else None  # it knows nothing before the first
        terms = {name: x for name, x in row.terms.items() if number or name not in COMPARING}
        facts, own = Facts(student, given.records, given.clusters), seed_of(seed, "round", number)
        new = invert(teacher, terms, shape, size, options=options, facts=facts, seed=own, tell=tell, making=making)
        samples = new if samples is None else _join(samples, new)
        if learner is not None:
            learn(learner, (samples.images, samples.scores), part, making)
    assert samples is not None
    return samples


def _shares(whole: int, parts: int) -> list[int]:
    """A number in parts that differ by 1 at most, larger ones first."""
    return [whole // parts + (i < whole % parts) for i in range(parts)]


def _refuse_unread(
    row: Preset,
    student: nn.Module | None,
    count: int | None,
    student_steps: int | None,
    inversion: Options,
    generation: Options,
    learning: Options,
) -> None:
    """Raise PlanError for arguments that a preset does not read, and for numbers out of range."""
    unread = {*UNREAD[row.family], *(() if student is not None else ("student_steps", "learning"))}
    given = {"count": count is not None, "student_steps": student_steps is not None}
    given |= {"inversion": bool(inversion), "generation": bool(generation), "learning": bool(learning)}
    problems = [name for name, present in given.items() if present and name in unread]
    if problems:
        alone = "" if student is not None else " without a student"
        raise PlanError(f"{row.name} does not read {', '.join(problems)}{alone}; leave that out")
    for name, value in (("count", count), ("student_steps", student_steps)):
        if value is not None and value < 1:
            raise PlanError(f"{name} is {value}; expected at least 1")


def _fit(row: Preset, teacher: nn.Module, student: nn.Module | None, given: Given) -> Preset:
    """The preset as it is for this teacher. Raises PlanError with everything that it needs and is not given."""
    comparing = [name for name in row.terms if name in COMPARING]
    if row.family == "pixels" and comparing and row.rounds < 2:
        raise PlanError(
            f"{row.name} has {', '.join(comparing)} and one round; expected two or more, as the first one is made "
            "without the student. Give it more rounds"
        )
    if "bn" in row.terms and not batchnorms(teacher) and given.records:
        row = replace(row, terms=with_records(row.terms, given.records))
    present = {
        "batch_norm": bool(batchnorms(teacher)),
        "records": bool(given.records),
        "clusters": given.clusters is not None,
        "proxy": given.images is not None,
        "wild": given.images is not None,
    }
    check_needs(row, present, student=student is not None)
    return row


def _settle(kind: Callable[..., S], values: Mapping[str, Any]) -> S:
    """Settings of a class by their names. Raises PlanError for a name that it does not have."""
    known = [*signature(kind).parameters]
    for name in values:
        if name not in known:
            raise PlanError(f"found the option {name!r}; {did_you_mean(name, known)}")
    return kind(**values)


def _by_generator(
    teacher: nn.Module,
    student: nn.Module,
    row: Preset,
    shape: tuple[int, int, int],
    given: Given,
    pixels: tuple[float, float],
    generation: Generation,
    learning: Learning,
    seed: int,
    tell: Tell | None,
    making: Making,
) -> Synthesis:
    how: dict[str, Any] = {"low": pixels[0], "high": pixels[1]}
    own, device = seed_of(seed, "generator"), next(teacher.parameters()).device
    classes = class_count(teacher) if generation.conditional else 0
    generator: Generator | Stack
    if generation.stacked:
        generator = build(partial(Stack, shape, shared_sizes(teacher, student, shape), **how), own).to(device)
    else:
        generator = build(partial(Generator, shape, classes=classes, **how), own).to(device)
    made = generate(
        teacher,
        student,
        generator,
        row.terms,
        options=generation,
        learning=learning,
        records=given.records,
        proxy=given.images,
        seed=seed,
        tell=tell,
        making=making,
    )
    return Synthesis(made.samples, made.record, tuple(line["student"] for line in made.record if "student" in line))


def _join(first: Samples, second: Samples) -> Samples:
    return Samples(torch.cat([first.images, second.images]), torch.cat([first.scores, second.scores]))
